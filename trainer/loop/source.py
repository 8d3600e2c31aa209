"""What the rows of a run come from, as the loop sees it: the stream, and what could not be read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from recpress.data.sampling.corrupt_groups import Lost, TolerantSplit
from recpress.data.stream.batch import Batch
from recpress.data.stream.stream import InteractionStream

Next = Literal["round", "stop", "end"]


class Source:
    """The rows of a run: one stream for all epochs.

    `state` and `restore` are what a checkpoint keeps of it; `FollowedSource` adds rounds of new files.
    """

    grows = False
    """Whether there may be epochs after those of the configuration: then `wait` is asked for the next."""

    def __init__(self, stream: InteractionStream, bad_files: Mapping[str, str] | None = None) -> None:
        self.stream, self.bad_files = stream, dict(bad_files or {})
        self.skips = isinstance(stream.rows, TolerantSplit)
        self.lost: Lost = stream.rows.lost if isinstance(stream.rows, TolerantSplit) else {}
        self._known = 0  # of `lost`, on all ranks

    def stream_of(self, epoch: int) -> InteractionStream:
        """The stream of an epoch, counted from 0."""
        return self.stream

    @property
    def num_rows(self) -> int:
        """Rows of the sample that an epoch, or all rounds together, have."""
        return self.stream.num_rows

    @property
    def lost_rows(self) -> int:
        """Rows of the sample in the row groups that could not be read."""
        return sum(list(self.lost.values()))  # a copy: the stream's threads add to it

    def known(self, epoch: int) -> bool:
        """Whether there is such an epoch, besides those of the configuration."""
        return False

    def wait(self, signal: Callable[[], str | None]) -> Next:
        """Until there is another round, a signal came on any rank, or there will be none. Collective."""
        return "end"

    def take(self, batch: Batch) -> None:
        """The pipeline takes a batch."""

    def trained(self) -> None:
        """The oldest batch that was taken is trained on."""

    def drop(self) -> None:
        """Batches that were taken will not be trained on."""

    def scalars(self) -> dict[str, float]:
        """What was lost so far, on all ranks together. Collective."""
        if not self.skips:
            return {}
        self._share()
        return {
            "stream/bad_files": float(len(self.bad_files)),
            "stream/bad_row_groups": float(len(self.lost)),
            "stream/lost_rows": float(self.lost_rows),
        }

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it, besides the files of the log; after `scalars` the same on every rank."""
        if not self.skips:
            return {}
        return {"bad_files": self.bad_files, "bad_row_groups": len(self.lost), "lost_rows": self.lost_rows}

    def _share(self) -> None:
        """What one rank could not read, no other tries: a row group is lost for all, and counted once."""
        changed = torch.tensor([len(self.lost) != self._known], dtype=torch.int32)
        dist.all_reduce(changed, dist.ReduceOp.MAX)
        if not int(changed):
            return
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, dict(self.lost))
        for of_rank in everyone:
            for place, rows in of_rank.items():
                self.lost[place] = min(rows, self.lost.get(place, rows))
        self._known = len({place for of_rank in everyone for place in of_rank})

    def state(self) -> dict[str, Any]:
        """JSON values, the same on every rank after `scalars`."""
        return {"lost": [[*place, rows] for place, rows in sorted(list(self.lost.items()))]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint says."""
        if self.skips:
            self.lost.update({(file, group): rows for file, group, rows in state["lost"]})
            self._known = len(self.lost)
