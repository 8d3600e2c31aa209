"""The error that a user can cause."""


class InputError(ValueError):
    """Input or configuration that cannot be used; one line that names the place and what was expected."""
