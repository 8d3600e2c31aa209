"""The clock of a log interval: seconds of training, and how much of them the trainer's thread waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.profiler import record_function

from recpress.trainer.observability.step_parts import DATA, PAUSE


class Interval:
    """Runs from `restart`, or from the last `end`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._begin, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that gives the next batch, by the trainer's thread: what a prefetching stream has ready costs
        next to nothing here."""
        start = time.perf_counter()
        with record_function(DATA):
            yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self, *, named: bool = True) -> Iterator[None]:
        """Around what is no training; in a profile it has a range of its own where it is `named`."""
        start = time.perf_counter()
        with record_function(PAUSE) if named else nullcontext():
            yield
        self._begin += time.perf_counter() - start

    def end(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting); the next interval begins."""
        now = time.perf_counter()
        seconds, waited = now - self._begin, self._waited
        self._begin, self._waited = now, 0.0
        return seconds, min(1.0, waited / max(seconds, 1e-9))
