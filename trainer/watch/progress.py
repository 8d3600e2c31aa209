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
