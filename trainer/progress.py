"""The status line of a run, on rank 0: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

import torch.distributed as dist
from tqdm import tqdm


class Progress:
    """Steps done, with loss, learning rate, rows/s and the time left; silent on other ranks than 0, or without `show`.

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

    def update(self, steps: int, *, loss: float, learning_rate: float, rows_per_second: float) -> None:
        """Advance by `steps`."""
        self._done += steps
        numbers = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rows_per_second:,.0f} rows/s"
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
