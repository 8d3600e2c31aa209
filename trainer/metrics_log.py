"""Scalars of a run: JSON lines and TensorBoard, written by rank 0."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist


class MetricsLog:
    """`metrics.jsonl` (one object a line: step, seconds, and the scalars) and TensorBoard events in `folder`.

    On other ranks than 0, and with folder None, nothing is written.
    """

    def __init__(self, folder: str | Path | None, *, tensorboard: bool = True) -> None:
        self._file = self._board = None
        self._start = time.monotonic()
        if folder is None or dist.get_rank() != 0:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(folder))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append scalars of a step."""
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
