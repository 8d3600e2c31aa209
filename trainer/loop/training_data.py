"""The data of a training run, as the loop uses it: the stream of each epoch, and rows that could not be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from recpress.data.sampling.corrupt_groups import Lost, TolerantSplit
from recpress.data.stream.batch import Batch
from recpress.data.stream.loader import InteractionStream

Next = Literal["epoch", "stop", "end"]


class TrainingData:
    """One stream for all epochs. Subclasses may add epochs. `state` and `restore` are for checkpoints."""

    grows = False
    """Whether `wait_for_epoch` may add epochs to those of the configuration."""

    def __init__(self, stream: InteractionStream, bad_files: Mapping[str, str] | None = None) -> None:
        self.stream, self.bad_files = stream, dict(bad_files or {})
        self.skips = isinstance(stream.rows, TolerantSplit)
        self.lost: Lost = stream.rows.lost if isinstance(stream.rows, TolerantSplit) else {}
        self._known = 0  # size of `lost` on all ranks

    def stream_of(self, epoch: int) -> InteractionStream:
        """The stream of an epoch, counted from 0."""
        return self.stream

    @property
    def num_rows(self) -> int:
        """Rows of the sample, of all streams together."""
        return self.stream.num_rows

    @property
    def lost_rows(self) -> int:
        """Rows of the sample in the row groups that could not be read."""
        return sum(list(self.lost.values()))  # a copy, because the stream's threads add to it

    def has_epoch(self, epoch: int) -> bool:
        """Whether this epoch was added."""
        return False

    def wait_for_epoch(self, signal: Callable[[], str | None]) -> Next:
        """Wait for another epoch ("epoch"), a signal on any rank ("stop"), or the end of data ("end"). Collective."""
        return "end"

    def batch_taken(self, batch: Batch) -> None:
        """The pipeline has taken a batch."""

    def batch_trained(self) -> None:
        """The pipeline has trained on the oldest batch that it took."""

    def batches_dropped(self) -> None:
        """The pipeline drops the batches that it took and did not train on."""

    def scalars(self) -> dict[str, float]:
        """Figures of this rank's stream, and what could not be read on all ranks. Collective."""
        found = {f"stream/{name}": value for name, value in self.stream.stats().as_dict().items()}
        if not self.skips:
            return found
        self._merge_lost()
        return found | {
            "stream/bad_files": float(len(self.bad_files)),
            "stream/bad_row_groups": float(len(self.lost)),
            "stream/lost_rows": float(self.lost_rows),
        }

    def describe(self) -> dict[str, Any]:
        """Entries of the manifest, in addition to the files of the log. The same on every rank after `scalars`."""
        if not self.skips:
            return {}
        return {"bad_files": self.bad_files, "bad_row_groups": len(self.lost), "lost_rows": self.lost_rows}

    def _merge_lost(self) -> None:
        """Make `lost` the same on all ranks: what one rank cannot read is lost for all, and counted once."""
        changed = torch.tensor([len(self.lost) != self._known], dtype=torch.int32)
        dist.all_reduce(changed, dist.ReduceOp.MAX)
        if not int(changed):
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(self.lost))
        for of_rank in everyone:
            for group, rows in of_rank.items():
                self.lost[group] = min(rows, self.lost.get(group, rows))
        self._known = len({group for of_rank in everyone for group in of_rank})

    def state(self) -> dict[str, Any]:
        """JSON values, the same on every rank after `scalars`."""
        return {"lost": [[*group, rows] for group, rows in sorted(list(self.lost.items()))]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        if self.skips:
            self.lost.update({(file, group): rows for file, group, rows in state["lost"]})
            self._known = len(self.lost)
