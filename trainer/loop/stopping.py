"""Stopping together: signals that one rank gets, and the clock of rank 0, become decisions of all ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from recpress.trainer.distributed.watchdog import NO_TIMEOUT
from recpress.trainer.observability.logging_setup import log_from_signal_handler

STOP, CHECKPOINT = 0, 1  # places in the flags
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


class StopSignal:
    """While the block runs, SIGTERM and SIGUSR1 are noted instead of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the first signal that came."""
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
            log_from_signal_handler(__name__, f"{self.name}: stopping after this step")


class Decisions:
    """What any rank wants, known to all of them one step later.

    Each step sends one small tensor over a group of its own while the next step is under way, and no step waits for it.
    """

    def __init__(self) -> None:
        self._world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT) if self._world > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    def exchange(self, *, stop: bool, checkpoint: bool) -> tuple[bool, bool]:
        """Called by every rank after each step; what any of them wanted after the step before it (now, if alone)."""
        if self._world == 1:
            return stop, checkpoint
        before = self.close()
        flags = torch.zeros(2, dtype=torch.int32)
        flags[STOP], flags[CHECKPOINT] = int(stop), int(checkpoint)
        self._sent = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def settle(self, *, stop: bool) -> bool:
        """Whether any rank wants to stop, now; called by every rank after the last step."""
        earlier = self.close()[STOP]
        now = self.exchange(stop=stop, checkpoint=False)[STOP]
        return earlier or now or self.close()[STOP]

    def close(self) -> tuple[bool, bool]:
        """Wait for what was sent last."""
        if self._sent is None:
            return False, False
        flags, work = self._sent
        work.wait()
        self._sent = None
        return bool(flags[STOP]), bool(flags[CHECKPOINT])
