"""Progress of long work with the remaining time: a bar on a terminal, otherwise log lines."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from tqdm import tqdm

from recpress.trainer.observability.logging_setup import shows_bars

logger = logging.getLogger(__name__)

comparisons = logging.getLogger("recpress.trainer.compare")
"""Logger of the comparisons, which silence the stages that they run but not themselves."""

LINE_SECONDS = 30.0
"""Seconds between two lines if there is no bar."""
_TICK_SECONDS = 1.0


class Progress:
    """Counts units of work, each of which takes a similar time. Use it in a `with`, or call `close`.

    Args:
        name: of the work.
        unit: singular noun.
        total: number of units, if known.
        show: False is silent. Usually rank 0 alone shows.
        line_seconds: minimum time between two lines of `update` if there is no bar.

    Example:
        >>> with Progress("counting ids", "row", total=100) as progress:
        ...     progress.update(60)
    """

    _logger = logger

    def __init__(
        self,
        name: str,
        unit: str = "step",
        total: int | None = None,
        *,
        show: bool = True,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self.name, self._unit, self.total, self.done = name, unit, total, 0
        self.show, self.line_seconds = show, line_seconds
        self.terminal = show and self._logger.isEnabledFor(logging.INFO) and shows_bars(sys.stderr)
        self.begin = self.last_line = time.monotonic()
        self._first = 0  # units that were done before `begin`
        self._bar = tqdm(
            total=total,
            desc=name,
            unit=unit,
            disable=not self.terminal,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]" if total else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def start_at(self, done: int) -> None:
        """Count from here: an earlier run has done the units before."""
        self.done = self._first = done
        self._bar.initial = self._bar.n = done
        self._bar.refresh()

    def update(self, units: int = 1, details: str = "") -> None:
        """Add units that are done. `details` are shown after the count."""
        self.done += units
        self._bar.set_postfix_str(_joined(details, self._left()), refresh=False)
        self._bar.update(units)
        if self.show and not self.terminal and time.monotonic() - self.last_line >= self.line_seconds:
            self.last_line = time.monotonic()
            self._logger.info("%s", self.line(details))

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of a stage of the work. Each stage has its own count."""
        if done < self.done or total != self.total:
            self.done, self._first, self.total, self.begin = 0, 0, total, time.monotonic()
            self._bar.reset(total)
        self.update(done - self.done, name)

    def write(self, text: str) -> None:
        """Log a line, above the bar if there is one."""
        if self.show:
            self._logger.info("%s", text)

    def line(self, details: str = "") -> str:
        """`counting ids: 60 of 100 rows (60%), 00:31 elapsed, about 00:20 left`."""
        count = f"{self.done:,} {self._unit}s"
        if self.total:
            count = f"{self.done:,} of {self.total:,} {self._unit}s ({self.done / self.total:.0%})"
        elapsed = f"{tqdm.format_interval(time.monotonic() - self.begin)} elapsed"
        return f"{self.name}: {_joined(count, details, elapsed, self._left())}"

    def remaining(self) -> float | None:
        """Estimated seconds; None if the total is not known or nothing is done."""
        if not self.total or self.done == self._first:
            return None
        return (time.monotonic() - self.begin) / (self.done - self._first) * (self.total - self.done)

    def _left(self) -> str:
        seconds = self.remaining()
        return "" if seconds is None else f"about {tqdm.format_interval(seconds)} left"


class UnitProgress(Progress):
    """Progress over units of several kinds, with a mean time per kind. A thread reports while a long unit runs.

    Args:
        units: kind -> number of units to do.

    Example:
        >>> with UnitProgress("compare hash", {"factorize": 1, "learned": 10}) as progress:
        ...     with progress.unit("factorize", "factorization, seed 0"):
        ...         pass
    """

    _logger = comparisons

    def __init__(
        self,
        name: str,
        units: Mapping[str, int],
        *,
        show: bool = True,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        super().__init__(name, "unit", sum(units.values()), show=show, line_seconds=line_seconds)
        self._todo = dict(units)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._kind, self._label, self._since = "", "", 0.0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self.begin = self.last_line = time.monotonic()
        if self.show:
            self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        super().close()

    @contextmanager
    def unit(self, kind: str, label: str) -> Iterator[None]:
        """One unit of work. `label` describes it."""
        with self._lock:
            self._kind, self._label, self._since = kind, label, time.monotonic()
        yield
        with self._lock:
            if self._kind:
                self._seconds[kind].append(time.monotonic() - self._since)
            self._todo[kind] = max(0, self._todo.get(kind, 0) - 1)
            self._kind = ""
            self.done += 1
            self._bar.update()

    def loaded(self) -> None:
        """The result of the running unit exists: its time says nothing of other units."""
        with self._lock:
            self._kind = ""

    def skip(self, kind: str, number: int) -> None:
        """Reduce the number of units of this kind that are still to do."""
        with self._lock:
            self._todo[kind] = max(0, self._todo.get(kind, 0) - number)
            self.total = self._bar.total = self.done + sum(self._todo.values())

    def say(self, text: str) -> None:
        """Log a result."""
        with self._lock:
            self.last_line = time.monotonic()
            self.write(text)

    def remaining(self) -> float | None:
        """Estimated seconds: units to do times the mean time of their kind, or of all kinds if it has none yet."""
        measured = [seconds for of_kind in self._seconds.values() for seconds in of_kind]
        if not measured:
            return None
        mean = sum(measured) / len(measured)
        total = 0.0
        for kind, number in self._todo.items():
            of_kind = self._seconds.get(kind)
            each = sum(of_kind) / len(of_kind) if of_kind else mean
            total += number * each
            if kind == self._kind and number:  # a part of the running unit is done
                total -= min(each, time.monotonic() - self._since)
        return total

    def _report(self) -> None:
        tick = min(_TICK_SECONDS, self.line_seconds)
        while not self._stop.wait(tick):
            with self._lock:
                label = f"now {self._label}" if self._kind else ""
                if self.terminal:
                    self._bar.set_postfix_str(_joined(label, self._left()), refresh=True)
                elif time.monotonic() - self.last_line >= self.line_seconds - tick:
                    self.last_line = time.monotonic()
                    self._logger.info("%s", self.line(label))


def _joined(*texts: str) -> str:
    return ", ".join(text for text in texts if text)
