"""Stop together: a signal on one rank, or the clock of rank 0, becomes a decision of all ranks after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from recpress.trainer.distributed.watchdog import NO_TIMEOUT
from recpress.trainer.observability.logging_setup import log_from_signal_handler

STOP, CHECKPOINT = 0, 1  # indices of the flags
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job."""


class StopSignal:
    """Within the block SIGTERM and SIGUSR1 set `name` instead of ending the process. Main thread only.

    Args:
        unit: what the run finishes before it stops; the log line names it.
    """

    def __init__(self, unit: str = "step") -> None:
        self._unit = unit
        self.name: str | None = None
        """Of the first signal."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            log_from_signal_handler(__name__, f"{self.name}: stopping after this {self._unit}")


class DelayedFlags:
    """An all-reduce of two flags per step, read one step later, so that no step waits for it.

    It uses its own gloo group.
    """

    def __init__(self) -> None:
        self._world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT) if self._world > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    def exchange(self, *, stop: bool, checkpoint: bool) -> tuple[bool, bool]:
        """Send the flags of this step; return those of the step before, of any rank (a single rank: of this step)."""
        if self._world == 1:
            return stop, checkpoint
        before = self.close()
        flags = torch.zeros(2, dtype=torch.int32)
        flags[STOP], flags[CHECKPOINT] = int(stop), int(checkpoint)
        self._sent = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def settle(self, *, stop: bool) -> bool:
        """Whether any rank wants to stop; call it after the last step. Waits."""
        earlier = self.close()[STOP]
        now = self.exchange(stop=stop, checkpoint=False)[STOP]
        return earlier or now or self.close()[STOP]

    def close(self) -> tuple[bool, bool]:
        """Wait for the flags that were sent last, and return them."""
        if self._sent is None:
            return False, False
        flags, work = self._sent
        work.wait()
        self._sent = None
        return bool(flags[STOP]), bool(flags[CHECKPOINT])
