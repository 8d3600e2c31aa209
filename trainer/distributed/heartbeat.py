"""What this rank is doing: for the watchdog, and for the messages of ranks that wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

WAITING_FOR_DATA = "waiting for data"


@dataclass
class Heartbeat:
    """Activity of this rank's main thread. A training step has a time limit; anything outside of steps has none."""

    step: int | None = None
    """The training step; None outside of steps."""
    activity: str = ""
    since: float = field(default_factory=time.monotonic)
    waiting_since: float | None = None
    """Since when this rank has waited for other ranks, outside of steps."""

    def in_step(self, step: int, activity: str = "in the step") -> None:
        """Start an activity of this step. It must end within `stall_seconds` of `process_group`."""
        self.step, self.activity, self.since = step, activity, time.monotonic()

    def outside_step(self) -> None:
        """Leave the steps, for example to evaluate or to save. No time limit applies."""
        self.step, self.activity, self.since = None, "", time.monotonic()


heartbeat = Heartbeat()
"""The one of this process."""


@contextmanager
def activity(name: str) -> Iterator[None]:
    """Name what this rank does while others may wait for it. Their messages show it, for example "building maps"."""
    before = heartbeat.activity, heartbeat.since
    heartbeat.activity, heartbeat.since = name, time.monotonic()
    try:
        yield
    finally:
        heartbeat.activity, heartbeat.since = before


@contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """A collective outside of steps, which may wait for other ranks without a time limit."""
    heartbeat.waiting_since = time.monotonic()
    try:
        yield
    finally:
        heartbeat.waiting_since = None


def barrier() -> None:
    """Wait for all ranks, without a time limit. Collective."""
    with waiting_for_ranks():
        dist.barrier()
