"""The error for invalid input."""


class InputError(ValueError):
    """Invalid input or configuration, in one line: what is wrong, where, and what was expected."""
