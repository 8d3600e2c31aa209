"""Counts rows with ids that the id maps of a model do not know, as new files of a growing log have them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from recpress.data.stream.batch import ITEM, USER, Batch


class UnknownIds:
    """Counts rows whose user or item id is beyond those of its map. Negatives never are.

    The pipeline takes batches before it trains on them, but a checkpoint must count only rows that were trained on. So
    `batch_taken` counts a batch, and `batch_trained` adds the count of the oldest batch.

    Args:
        known: "user", "item" -> number of ids of its map.
    """

    def __init__(self, known: Mapping[str, int]) -> None:
        self.known = dict(known)
        self.total = dict.fromkeys(self.known, 0)
        """Side -> rows of all ranks, as of the last `reduce`."""
        self._ahead: deque[torch.Tensor] = deque()
        self._own: torch.Tensor | None = None  # of this rank, since the last `reduce`, on the device of the batches

    def batch_taken(self, batch: Batch) -> None:
        """Does not wait for the device."""
        rows = batch.label.shape[0]
        ids = {USER: batch.user_features[USER].values(), ITEM: batch.item_features[ITEM].values()[:rows]}
        self._ahead.append(torch.stack([(ids[side] >= known).sum() for side, known in self.known.items()]))

    def batch_trained(self) -> None:
        oldest = self._ahead.popleft()
        if oldest.is_cuda:  # computed on the CUDA stream on which the pipeline takes batches
            oldest.record_stream(torch.cuda.current_stream())
        self._own = oldest if self._own is None else self._own + oldest

    def batches_dropped(self) -> None:
        """Forget the batches that were taken and not trained on."""
        self._ahead.clear()

    def reduce(self) -> dict[str, int]:
        """The current `total`. Collective."""
        found = torch.zeros(len(self.known), dtype=torch.int64) if self._own is None else self._own.cpu()
        dist.all_reduce(found)
        self._own = None
        for side, more in zip(self.known, found.tolist(), strict=True):
            self.total[side] += more
        return self.total

    def restore(self, total: Mapping[str, Any]) -> None:
        """Restore the `total` of a checkpoint."""
        self.total |= {side: int(rows) for side, rows in total.items() if side in self.known}
