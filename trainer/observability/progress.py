"""The status line of a run, on rank 0: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

import torch.distributed as dist
from tqdm import tqdm

_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/rows_per_second": "{:,.0f} rows/s",
    "train/waiting": "waiting {:.0%}",
    "train/ne": "NE {:.3f}",
    "train/auc": "AUC {:.3f}",
    "hash/unknown_users": "{:,.0f} unknown users",
    "hash/unknown_items": "{:,.0f} unknown items",
}


class Progress:
    """Steps done, with loss, learning rate, rows/s, the share of the time that is spent waiting for data, TorchRec's
    metrics where there are some, and the time left; silent on other ranks than 0, or without `show`.

    Where standard error is no terminal (the log file of a scheduler) each update is a line of its own.
    """

    def __init__(self, total: int | None, description: str, show: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = show and dist.get_rank() == 0
        self._total, self._description = total, description
        self._done, self._first, self._begin = 0, 0, time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit="step",
            disable=not self._shown or not self._stream.isatty(),
            file=self._stream,
            dynamic_ncols=True,
        )

    def update(self, steps: int, scalars: Mapping[str, float]) -> None:
        """Advance by `steps`; of the scalars those that `_SHOWN` names are shown."""
        self._done += steps
        numbers = ", ".join(form.format(scalars[name]) for name, form in _SHOWN.items() if name in scalars)
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update(steps)
        if self._bar.disable:
            self.say(f"{self._description}: {self._place()}, {numbers}{self._left()}")

    def skip(self, steps: int) -> None:
        """Begin at this step: those before it were done by an earlier run."""
        self._done = self._first = steps
        self._bar.initial = self._bar.n = steps
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self._bar.disable:
            self._bar.write(text, file=self._stream)
        elif self._shown:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _place(self) -> str:
        if not self._total:
            return f"step {self._done:,}"
        return f"step {self._done:,} of {self._total:,} ({self._done / self._total:.0%})"

    def _left(self) -> str:
        if not self._total or self._done == self._first:
            return ""
        seconds = (time.monotonic() - self._begin) / (self._done - self._first) * (self._total - self._done)
        return f", {tqdm.format_interval(seconds)} left"


class Steps:
    """Progress of one long piece of work: a bar on a terminal, elsewhere a line every `seconds`, with the time left.

    Used in a `with`. Silent where `show` is false, so that one rank speaks.
    """

    def __init__(
        self,
        description: str,
        unit: str,
        total: int | None = None,
        *,
        show: bool = True,
        stream: TextIO | None = None,
        seconds: float = 30.0,
    ) -> None:
        self._description, self._stream = description, stream or sys.stderr
        self._lines = show and not self._stream.isatty()
        self._seconds, self._said, self._begin = seconds, time.monotonic(), time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=unit,
            disable=not show or self._lines,
            file=self._stream,
            dynamic_ncols=True,
            leave=False,
        )
        self._unit, self._total, self._done, self._stage = unit, total, 0, ""

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, steps: int = 1) -> None:
        """Advance by so many units."""
        self._done += steps
        self._bar.update(steps)
        now = time.monotonic()
        if self._lines and now - self._said >= self._seconds:
            self._said = now
            print(f"{self._description}{self._stage}: {self._place()}", file=self._stream, flush=True)

    def stage(self, name: str, done: int, total: int) -> None:
        """`done` of `total` units of a stage of the work; the count starts anew with each stage."""
        if done < self._done or total != self._total:
            self._done, self._total, self._begin = 0, total, time.monotonic()
            self._bar.reset(total)
        self._stage = f", {name}"
        self._bar.set_postfix_str(name, refresh=False)
        self.update(done - self._done)

    def _place(self) -> str:
        spent = time.monotonic() - self._begin
        if not self._total:
            return f"{self._done:,} {self._unit}s, {tqdm.format_interval(spent)}"
        left = spent / max(1, self._done) * (self._total - self._done)
        share = f"{self._done:,} of {self._total:,} {self._unit}s ({self._done / self._total:.0%})"
        return f"{share}, {tqdm.format_interval(left)} left"
