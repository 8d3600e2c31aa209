"""Progress of a long comparison with its remaining time: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Longest silence of a command whose standard error is not a terminal."""
_TICK_SECONDS = 1.0


class UnitProgress:
    """Units of work of several kinds, of which each kind takes a similar time.

    A thread reports while a unit runs, so that a unit of an hour is not silent. The remaining time adds up, for each
    kind, the units to do times the mean seconds of those that were done; a kind that was not measured yet counts as
    the mean of all units.

    Args:
        name: of the command.
        units: kind -> number of units to do.
        shown: False on ranks that say nothing.
        stream: where lines and the bar go; standard error by default.
        line_seconds: longest time without a line where the stream is not a terminal.

    Example::

        with UnitProgress("compare hash", {"factorize": 1, "learned": 10}) as progress:
            with progress.unit("factorize", "factorization, seed 0"):
                ...
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
        self._stream, self._line_seconds = stream or sys.stderr, line_seconds
        self._shown, self._terminal = shown, shown and self._stream.isatty()
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._kind, self._label, self._since = "", "", 0.0
        self._begin = self._last = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._bar = tqdm(
            total=sum(self._left.values()),
            desc=name,
            disable=not self._terminal,
            file=self._stream,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._thread = threading.Thread(target=self._run, name="comparison-progress", daemon=True)

    def __enter__(self) -> UnitProgress:
        self._begin = self._last = time.monotonic()
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._shown:
            self._thread.join()
        self._bar.close()

    @contextmanager
    def unit(self, kind: str, label: str) -> Iterator[None]:
        """One unit of work. `label` says what it is, in words."""
        with self._lock:
            self._kind, self._label, self._since = kind, label, time.monotonic()
        yield
        with self._lock:
            self._seconds[kind].append(time.monotonic() - self._since)
            self._left[kind] = max(0, self._left.get(kind, 0) - 1)
            self._kind = ""
            self._bar.update()

    def skip(self, kind: str, number: int) -> None:
        """`number` units of this kind will not be done."""
        with self._lock:
            self._left[kind] = max(0, self._left.get(kind, 0) - number)
            self._bar.total = self._total()

    def say(self, text: str) -> None:
        """A result, as a line on standard output; the bar stays below it."""
        if not self._shown:
            return
        with self._lock:
            self._last = time.monotonic()
            if self._terminal:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
            else:
                print(text, flush=True)

    def remaining(self) -> float | None:
        """Seconds, estimated; None before the first unit is done."""
        measured = [seconds for of_kind in self._seconds.values() for seconds in of_kind]
        if not measured:
            return None
        mean = sum(measured) / len(measured)
        total = 0.0
        for kind, number in self._left.items():
            of_kind = self._seconds.get(kind)
            each = sum(of_kind) / len(of_kind) if of_kind else mean
            total += number * each
            if kind == self._kind and number:  # the running unit has done a part of its share
                total -= min(each, time.monotonic() - self._since)
        return total

    def line(self) -> str:
        """`compare hash: 3 of 12 done, 00:31 elapsed, about 01:33 left; now Cluster, trial 4 of 10`."""
        total = self._total()
        done = total - sum(self._left.values())
        elapsed = tqdm.format_interval(time.monotonic() - self._begin)
        now = f"; now {self._label}" if self._kind else ""
        return f"{self._name}: {done} of {total} done, {elapsed} elapsed{self._about()}{now}"

    def _about(self) -> str:
        seconds = self.remaining()
        return "" if seconds is None else f", about {tqdm.format_interval(seconds)} left"

    def _total(self) -> int:
        return sum(self._left.values()) + sum(map(len, self._seconds.values()))

    def _run(self) -> None:
        tick = min(_TICK_SECONDS, self._line_seconds)
        while not self._stop.wait(tick):
            with self._lock:
                if self._terminal:
                    now = f"; {self._label}" if self._kind else ""
                    self._bar.set_postfix_str(f"{self._about().removeprefix(', ')}{now}", refresh=True)
                elif time.monotonic() - self._last >= self._line_seconds - tick:
                    self._last = time.monotonic()
                    print(self.line(), file=self._stream, flush=True)
