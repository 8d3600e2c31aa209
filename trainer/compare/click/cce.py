"""Clustered compositional embeddings (Tsang and Ahle, "Clustering the Sketch", NeurIPS 2023)."""

from __future__ import annotations

import torch

from recpress.modules.hashing.k_means import k_means
from recpress.trainer.compare.click.tables import IdTable, embedding

ITERATIONS = 10


class ClusteredTable(IdTable):
    """The vector of an id has `chunks` parts. Each is the sum of two rows, one of a main and one of a helper table.

    Both rows are random at first. `after_epoch` clusters the parts of all ids by k-means: the main row of an id is its
    center from then on, its helper row is drawn anew, and the helper tables start from the mean residuals. The main
    rows are an id map; the helper rows are hashed.

    Args:
        rows: of dimension `dim` in total: each table has half of them, of dimension dim / chunks for each chunk.
        clusterings: so many epochs end with a clustering.

    Raises:
        ValueError: fewer than two rows; `chunks` does not divide the dimension.
    """

    pointers: torch.Tensor  # (2, ids, chunks) int64 rows of `numbers`: main, helper

    def __init__(self, ids: int, rows: int, dim: int, chunks: int, seed: int, clusterings: int) -> None:
        super().__init__()
        if rows < 2 or dim % chunks:
            raise ValueError(f"{rows} rows of dimension {dim} in {chunks} chunks")
        self.each, self.chunks, self.left = rows // 2, chunks, clusterings
        self._random = torch.Generator().manual_seed(seed)
        self.numbers = embedding(2 * chunks * self.each, dim // chunks, dim**-0.5)
        self.register_buffer("pointers", torch.stack([self._drawn(ids, part) for part in (0, 1)]))

    def _first(self, part: int) -> torch.Tensor:
        """First row of each chunk of the main (0) or the helper (1) table."""
        return (part * self.chunks + torch.arange(self.chunks)) * self.each

    def _drawn(self, ids: int, part: int) -> torch.Tensor:
        return torch.randint(self.each, (ids, self.chunks), generator=self._random) + self._first(part)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.numbers(self.pointers[:, ids]).sum(0).flatten(1)

    @torch.no_grad()
    def after_epoch(self) -> None:
        if not self.left:
            return
        self.left -= 1
        weight, ids = self.numbers.weight, self.pointers.shape[1]
        vectors = weight[self.pointers].sum(0)  # (ids, chunks, dim / chunks)
        self.pointers[1] = self._drawn(ids, 1)
        for chunk in range(self.chunks):
            main, helper = (slice(first, first + self.each) for first in (self._first(p)[chunk] for p in (0, 1)))
            seed = int(torch.randint(1 << 31, (1,), generator=self._random))
            found = k_means(vectors[:, chunk].contiguous(), None, self.each, seed=seed, iterations=ITERATIONS)
            self.pointers[0, :, chunk] = found.assignment + main.start
            residual = vectors[:, chunk] - found.centers[found.assignment.long()]
            rows = self.pointers[1, :, chunk] - helper.start
            counts = torch.bincount(rows, minlength=self.each).clamp_min(1)
            weight[main] = found.centers
            weight[helper] = torch.zeros(self.each, weight.shape[1]).index_add_(0, rows, residual) / counts[:, None]
