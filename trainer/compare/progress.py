"""Progress of a long comparison with its remaining time: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Longest silence if standard error is not a terminal."""


class UnitProgress:
    """Units of work of several kinds; units of one kind take a similar time.

    A thread reports while a unit runs, so that a unit of an hour is not silent. The remaining time is, for each kind,
    the number of units left times the mean seconds of those done; a kind without a measurement uses the mean of all.

    Args:
        name: of the command.
        units: kind -> number of units.
        shown: False on ranks that print nothing.
        stream: of lines and bar; standard error by default.
        line_seconds: longest time without a line if the stream is not a terminal.

    Example:
        >>> with UnitProgress("compare hash", {"factorize": 1, "learned": 10}) as progress:
        ...     with progress.unit("factorize", "factorization, seed 0"):
        ...         pass
    """

    def __init__(
        self,
        name: str,
        units: Mapping[str, int],
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._name, self._left = name, dict(units)
        self._stream, self._line_seconds, self._shown = stream or sys.stderr, line_seconds, shown
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._kind, self._label, self._since = "", "", 0.0
        self._begin = self._last_line = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._bar = tqdm(
            total=sum(self._left.values()),
            desc=name,
            disable=not (shown and self._stream.isatty()),
            file=self._stream,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._thread = threading.Thread(target=self._report, name="comparison-progress", daemon=True)

    def __enter__(self) -> UnitProgress:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._shown:
            self._thread.join()
        self._bar.close()

    @contextmanager
    def unit(self, kind: str, label: str) -> Iterator[None]:
        """One unit of work; `label` names it. A unit that raises is not done."""
        with self._lock:
            self._kind, self._label, self._since = kind, label, time.monotonic()
        yield
        with self._lock:
            self._seconds[kind].append(time.monotonic() - self._since)
            self._left[kind] = max(0, self._left.get(kind, 0) - 1)
            self._kind = ""
            self._bar.update()

    def skip(self, kind: str, number: int) -> None:
        """`number` units of this kind will not run."""
        with self._lock:
            self._left[kind] = max(0, self._left.get(kind, 0) - number)
            self._bar.total = self._total()

    def say(self, text: str) -> None:
        """Print a result to standard output, above the bar."""
        if self._shown:
            with self._lock, tqdm.external_write_mode(file=sys.stdout):
                self._last_line = time.monotonic()
                print(text, flush=True)

    def remaining(self) -> float | None:
        """Seconds, estimated; None before the first unit is done."""
        measured = [seconds for of_kind in self._seconds.values() for seconds in of_kind]
        if not measured:
            return None
        total = 0.0
        for kind, number in self._left.items():
            of_kind = self._seconds.get(kind) or measured
            each = sum(of_kind) / len(of_kind)
            total += number * each
            if kind == self._kind and number:  # a part of the running unit is done
                total -= min(each, time.monotonic() - self._since)
        return total

    def line(self) -> str:
        """`compare hash: 3 of 12 done, 00:31 elapsed, about 01:33 left; now Cluster, trial 4 of 10`."""
        total = self._total()
        done = total - sum(self._left.values())
        elapsed = tqdm.format_interval(time.monotonic() - self._begin)
        return f"{self._name}: {done} of {total} done, {elapsed} elapsed{self._status()}"

    def _status(self) -> str:
        seconds = self.remaining()
        left = "" if seconds is None else f", about {tqdm.format_interval(seconds)} left"
        return left + (f"; now {self._label}" if self._kind else "")

    def _total(self) -> int:
        return sum(self._left.values()) + sum(map(len, self._seconds.values()))

    def _report(self) -> None:
        tick = min(1.0, self._line_seconds)
        while not self._stop.wait(tick):
            with self._lock:
                if not self._bar.disable:
                    self._bar.set_postfix_str(self._status().lstrip(",; "), refresh=True)
                elif time.monotonic() - self._last_line >= self._line_seconds - tick:
                    self._last_line = time.monotonic()
                    print(self.line(), file=self._stream, flush=True)
