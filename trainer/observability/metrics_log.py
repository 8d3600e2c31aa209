"""Scalars of a run, written by rank 0: JSON lines, TensorBoard, and a Prometheus endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch.distributed as dist

from recpress.data.dataset import object_store

if TYPE_CHECKING:
    from recpress.trainer.observability.prometheus import Endpoint

FILE = "metrics.jsonl"
_STATUS_LINE = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/rows_per_second": "{:,.0f} rows/s",
    "train/waiting": "waiting {:.0%}",
    "train/ne": "NE {:.3f}",
    "train/auc": "AUC {:.3f}",
    "hash/unknown_users": "{:,.0f} unknown users",
    "hash/unknown_items": "{:,.0f} unknown items",
}


def status_line(scalars: Mapping[str, float]) -> str:
    """The most important scalars as text."""
    return ", ".join(form.format(scalars[name]) for name, form in _STATUS_LINE.items() if name in scalars)


class MetricsLog:
    """`metrics.jsonl` (one JSON object per line: step, seconds, scalars) and TensorBoard events in `folder`.

    Appends to files that exist. Only rank 0 writes files, and only if a folder is given. `endpoint` gets the same
    scalars; the caller closes it.
    """

    def __init__(
        self, folder: str | Path | None, *, tensorboard: bool = True, endpoint: Endpoint | None = None
    ) -> None:
        self._endpoint = endpoint
        self._file: TextIO | None = None
        self._board: Any = None
        self._start = time.monotonic()
        if folder is None or dist.get_rank() != 0:
            return
        self._folder, self._tensorboard = Path(folder), tensorboard
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self, after: int | None = None) -> None:
        self._file = open(self._folder / FILE, "a", encoding="utf-8")  # noqa: SIM115
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(self._folder), purge_step=None if after is None else after + 1)

    def cut(self, step: int) -> None:
        """Remove lines of later steps, which a run wrote after its last checkpoint."""
        if self._file is None:
            return
        self.close()
        lines = (self._folder / FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept:
            self._start -= json.loads(kept[-1])["seconds"]  # the clock continues
        object_store.write_bytes(self._folder / FILE, "".join(kept).encode())
        self._open(after=step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of a step."""
        if self._endpoint is not None:
            self._endpoint.write(step, scalars)
        if self._file is None:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **scalars}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
