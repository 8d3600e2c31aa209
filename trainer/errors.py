"""Errors of a run on several ranks. Free of torch: the command line reports them."""


class RankFailed(RuntimeError):
    """Another rank failed; the message says which and why."""
