"""CAFE (Zhang et al., SIGMOD 2024): a sketch finds the ids with large gradients while training, and gives them rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from recpress.trainer.compare.click.tables import IdTable, embedding

SLOTS = 4
SLOT_BYTES = 12
"""A key, a score and a row number."""
DECAY = 0.99
FULL = 10
"""Scores decay whenever their sum since the last decay exceeds FULL times the buckets times the threshold."""


class HotRows(nn.Module):
    """Rows of the hot ids of all tables, and the sketch that finds these ids: a bucket of SLOTS ids for each row.

    Args:
        rows: hot rows and buckets.
        threshold: score from which an id is hot.
    """

    keys: torch.Tensor  # (rows, SLOTS) int64, -1: empty
    scores: torch.Tensor  # (rows, SLOTS) float32
    hot: torch.Tensor  # (rows, SLOTS) int64 row, -1: not hot

    def __init__(self, rows: int, dim: int, threshold: float) -> None:
        super().__init__()
        self.rows, self.threshold, self.total = embedding(rows, dim, dim**-0.5), threshold, 0.0
        self.register_buffer("keys", torch.full((rows, SLOTS), -1))
        self.register_buffer("scores", torch.zeros(rows, SLOTS))
        self.register_buffer("hot", torch.full((rows, SLOTS), -1))

    def look_up(self, keys: torch.Tensor) -> torch.Tensor:
        """Hot row of each key, -1 if it is not hot: (n,) int64."""
        buckets = keys % len(self.keys)
        return torch.where(self.keys[buckets] == keys[:, None], self.hot[buckets], -1).amax(1)

    def insert(self, keys: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add scores (n,) of keys (n,), which may repeat. Returns the keys that became hot, and their rows."""
        if self.total > FULL * len(self.keys) * self.threshold:
            self._decay()
        self.total += float(scores.sum())
        unique, inverse = np.unique(keys.numpy(), return_inverse=True)
        added = np.bincount(inverse, scores.numpy()).astype(np.float32)
        found_keys, found_scores, hot = self.keys.numpy(), self.scores.numpy(), self.hot.numpy()
        buckets = unique % len(found_keys)
        match = found_keys[buckets] == unique[:, None]
        known = match.any(1)
        at = buckets[known], match[known].argmax(1)
        found_scores[at] += added[known]
        self._admit(unique[~known], added[~known], buckets[~known])
        free = np.setdiff1d(np.arange(len(found_keys)), hot)
        rising = ((found_scores[at] >= self.threshold) & (hot[at] < 0)).nonzero()[0][: len(free)]
        rows = free[: len(rising)]
        hot[at[0][rising], at[1][rising]] = rows
        return torch.from_numpy(unique[known][rising]), torch.from_numpy(rows)

    def _admit(self, keys: np.ndarray, scores: np.ndarray, buckets: np.ndarray) -> None:
        """Each new key takes an empty slot of its bucket, or the one with the least score, which it inherits. The slot
        of a hot key stays."""
        found_keys, found_scores, hot = self.keys.numpy(), self.scores.numpy(), self.hot.numpy()
        while len(keys):
            turn = np.unique(buckets, return_index=True)[1]  # one key of each bucket
            bucket = buckets[turn]
            slot = found_scores[bucket].argmin(1)
            free = hot[bucket, slot] < 0
            found_keys[bucket[free], slot[free]] = keys[turn][free]
            found_scores[bucket[free], slot[free]] += scores[turn][free]
            keys, scores, buckets = (np.delete(array, turn) for array in (keys, scores, buckets))

    def _decay(self) -> None:
        self.scores *= DECAY
        self.hot[self.scores < self.threshold] = -1
        self.total = 0.0


class CafeTable(IdTable):
    """One table: hot ids have a row of `hot`, the others share `rows` rows by modulo.

    The score of an access is the norm of the gradient of its vector, in units of the mean of the batch. An id that
    becomes hot starts from its shared row.
    """

    def __init__(self, hot: HotRows, first: int, rows: int, dim: int) -> None:
        super().__init__()
        self.hot, self.first, self.shared = hot, first, embedding(rows, dim, dim**-0.5)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = self.hot.look_up(ids + self.first)
        shared = self.shared(ids % self.shared.num_embeddings)
        vectors = torch.where((row >= 0)[:, None], self.hot.rows(row.clamp_min(0)), shared)
        if self.training and vectors.requires_grad:
            vectors.retain_grad()
            self._seen = ids, vectors
        return vectors

    @torch.no_grad()
    def after_backward(self) -> None:
        assert self._seen is not None
        ids, vectors = self._seen
        self._seen = None
        assert vectors.grad is not None
        norms = vectors.grad.norm(dim=1)
        keys, rows = self.hot.insert(ids + self.first, norms / norms.mean().clamp_min(1e-30))
        self.hot.rows.weight[rows] = self.shared.weight[(keys - self.first) % self.shared.num_embeddings]
