"""The progress bar of a run, on rank 0."""

from __future__ import annotations

import sys

import torch.distributed as dist
from tqdm import tqdm


class Progress:
    """Steps done, with loss, learning rate and rows/s; silent on other ranks than 0, or without `show`."""

    def __init__(self, total: int | None, description: str, show: bool = True) -> None:
        hide = not show or dist.get_rank() != 0
        self._bar = tqdm(total=total, desc=description, unit="step", disable=hide, file=sys.stderr, dynamic_ncols=True)

    def update(self, steps: int, *, loss: float, learning_rate: float, rows_per_second: float) -> None:
        """Advance by `steps`."""
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {rows_per_second:,.0f} rows/s", refresh=False
        )
        self._bar.update(steps)

    def skip(self, steps: int) -> None:
        """Begin at this step: those before it were done by an earlier run."""
        self._bar.initial = self._bar.n = steps
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
