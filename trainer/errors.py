"""Errors of a run on several ranks. Free of torch: the command line reports them."""


class RankFailed(RuntimeError):
    """Another rank failed; the message says which and why."""


class Preempted(RuntimeError):
    """A signal asked the run to stop, on every rank after the same step; the message says where it goes on."""


PREEMPTED_STATUS = 75
"""Exit status of a run that was preempted: EX_TEMPFAIL of sysexits.h, "try again"."""

CHECKPOINT_THREAD = "checkpoint"
"""Name of the thread that writes a checkpoint, which a process that ends by an error does not wait for."""
