"""Which part of a training step ran out of memory, and what makes that part smaller."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from recpress.trainer.errors import OutOfMemory, is_out_of_memory, one_line

_BATCH = "fewer rows per batch (--stream.batch-size) or negatives (--negatives.count)"
_TABLES = "frozen int8 tables, fewer rows (`recpress hash`), or more ranks"
_PARTS = {
    "recpress.data.negatives": ("drawing negatives", _BATCH),
    "recpress.data": ("building the batch", _BATCH),
    "recpress.modules.hashing": ("looking up the id maps", _BATCH),
    "recpress.modules.frozen": ("looking up the frozen tables", f"{_BATCH}, or more ranks"),
    "recpress.modules.two_tower.towers": ("the towers", f"{_BATCH} or smaller --model.towers.hidden"),
    "recpress.modules.two_tower.losses": ("the loss", _BATCH),
    "recpress.modules.two_tower.predictions": ("the metrics of training", "--metrics.negatives 1"),
    "recpress.trainer.loop.optimizer": ("the optimizer of the dense part", _TABLES),
    "torch.optim": ("the optimizer of the dense part", _TABLES),
    "torch.autograd": ("the backward pass", _BATCH),
    "fbgemm_gpu": ("looking up the trainable tables", f"{_BATCH}; {_TABLES}"),
    "torchrec.distributed": ("the exchange between ranks", f"{_BATCH}; {_TABLES}"),
    "torchrec.models": ("the model", _BATCH),
}
"""Module -> (what it does in a step, what makes it smaller)."""


def in_step(error: BaseException, step: int) -> OutOfMemory | None:
    """The error to raise for one of a training step, counted from 1; None if it is not about memory."""
    if not is_out_of_memory(error):
        return None
    part, fix = _part(error.__traceback__)
    where = f"in step {step}{f', in {part}' if part else ''}"
    return OutOfMemory(f"out of memory {where}: {one_line(error)}; expected {fix}")


def _part(trace: TracebackType | None) -> tuple[str, str]:
    """That of the innermost function that belongs to a known part."""
    for module in reversed(list(_modules(trace))):
        for prefix in sorted(_PARTS, key=len, reverse=True):
            if f"{module}.".startswith(f"{prefix}."):
                return _PARTS[prefix]
    return "", f"{_BATCH}; {_TABLES}"


def _modules(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
