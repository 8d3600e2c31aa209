"""Losses, speed and waiting time of the steps between two log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import record_function

from recpress.trainer.observability.step_parts import DATA, PAUSE


@dataclass
class Summary:
    """An interval of this rank; `reduce` makes it that of all ranks."""

    losses: torch.Tensor
    """(steps,) float64, on the host."""
    rows: int
    seconds: float
    """Of this rank."""
    waited: float
    """Seconds that the main thread waited for data."""
    loss: float = math.nan
    """Mean of the finite losses of all ranks."""
    skipped: int = 0
    """Non-finite losses of all ranks."""
    waiting: float = 0.0
    """Share of the time, mean of the ranks."""
    waiting_slowest: float = 0.0
    """Share of the time, of the rank that waits most."""

    @property
    def first_bad(self) -> tuple[int, float] | None:
        """(step in the interval, loss) of the first non-finite loss of this rank."""
        bad = (~torch.isfinite(self.losses)).nonzero()
        return (int(bad[0]), float(self.losses[bad[0]])) if len(bad) else None

    def reduce(self) -> None:
        """Combine the ranks. Collective."""
        finite = torch.isfinite(self.losses)
        waits = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        waits[dist.get_rank()] = min(1.0, self.waited / max(self.seconds, 1e-9))
        sums = torch.stack([self.losses[finite].sum(), finite.sum().double(), (~finite).sum().double()])
        total = torch.cat([sums, waits])
        dist.all_reduce(total)
        self.loss = float(total[0] / total[1]) if total[1] else math.nan
        self.skipped = int(total[2])
        self.waiting, self.waiting_slowest = float(total[3:].mean()), float(total[3:].max())

    def scalars(self) -> dict[str, float]:
        return {
            "train/loss": self.loss,
            "train/rows_per_second": self.rows * dist.get_world_size() / max(self.seconds, 1e-9),
            "train/waiting": self.waiting,
            "train/waiting_slowest": self.waiting_slowest,
        }


class Interval:
    """Collects the steps since `restart` or the last `end`."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        """On the device."""
        self.restart()

    def restart(self) -> None:
        self._begin, self._waited, self._rows = time.perf_counter(), 0.0, 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """A step with this loss, on this many rows of this rank."""
        self.losses.append(loss)
        self._rows += rows

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call of the main thread for the next batch, which is fast if the batch is prefetched."""
        start = time.perf_counter()
        with record_function(DATA):
            yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self, *, named: bool = True) -> Iterator[None]:
        """Around work that is not training. `named`: show it as a range of a profile."""
        start = time.perf_counter()
        with record_function(PAUSE) if named else nullcontext():
            yield
        self._begin += time.perf_counter() - start

    def end(self) -> Summary:
        """The steps since the last call. Waits for the device."""
        losses = torch.stack(self.losses).double().cpu()
        now = time.perf_counter()
        found = Summary(losses, self._rows, now - self._begin, self._waited)
        self.losses, self._begin, self._waited, self._rows = [], now, 0.0, 0
        return found
