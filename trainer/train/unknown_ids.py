"""Ids of rows that are trained on and that the maps of a model do not know, as a growing log has them: counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from recpress.data.stream.batch import ITEM, USER, Batch


class UnknownIds:
    """Counts rows whose user, or whose item, is beyond the ids of its map. Negatives never are, and do not count.

    The pipeline takes batches before they are trained on, and a checkpoint must hold what was trained on alone: so
    `take` counts a batch, and `trained` adds the oldest one that was taken.

    Args:
        known: "user", "item" -> ids of its map.
    """

    def __init__(self, known: Mapping[str, int]) -> None:
        self.known = dict(known)
        self.total = dict.fromkeys(self.known, 0)
        """Side -> rows, on all ranks, as of the last `share`."""
        self._ahead: deque[torch.Tensor] = deque()
        self._own: torch.Tensor | None = None  # of this rank, since the last `share`, on the device of the batches

    def take(self, batch: Batch) -> None:
        """Nothing is read back from the device."""
        rows = batch.label.shape[0]
        ids = {USER: batch.user_features[USER].values(), ITEM: batch.item_features[ITEM].values()[:rows]}
        self._ahead.append(torch.stack([(ids[side] >= known).sum() for side, known in self.known.items()]))

    def trained(self) -> None:
        oldest = self._ahead.popleft()
        if oldest.is_cuda:  # made on the stream on which the pipeline takes batches
            oldest.record_stream(torch.cuda.current_stream())
        self._own = oldest if self._own is None else self._own + oldest

    def drop(self) -> None:
        """Forget what was taken and not trained on."""
        self._ahead.clear()

    def share(self) -> dict[str, int]:
        """`total`, up to now. Collective."""
        found = torch.zeros(len(self.known), dtype=torch.int64) if self._own is None else self._own.cpu()
        dist.all_reduce(found)
        self._own = None
        for side, more in zip(self.known, found.tolist(), strict=True):
            self.total[side] += more
        return self.total

    def restore(self, total: Mapping[str, Any]) -> None:
        """Go on from the `total` of a checkpoint."""
        self.total |= {side: int(rows) for side, rows in total.items() if side in self.known}
