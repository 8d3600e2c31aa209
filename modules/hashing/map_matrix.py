"""An id map as a sparse matrix: expand rows to ids, and fit rows to the vectors of ids."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from recpress.modules.hashing.id_map import IdMap

TINY = 1e-30


class MapMatrix:
    """The sparse matrix A (num_ids, num_rows) of an id map: the vectors of ids X = A C from the rows C of a table."""

    def __init__(self, id_map: IdMap) -> None:
        self.map = id_map
        self._rows = id_map.rows.long()
        self._weights = None if id_map.weights is None else id_map.weights.float()

    def expand(self, rows: torch.Tensor) -> torch.Tensor:
        """A C: (num_rows, d) -> (num_ids, d)."""
        if self.map.rows_per_id == 1 and self._weights is None:
            return rows[self._rows[:, 0]]
        return F.embedding_bag(self._rows, rows, mode="sum", per_sample_weights=self._weights)

    def collapse(self, vectors: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
        """A'V: (num_ids, d) -> (num_rows, d). `squared` squares the entries of A."""
        out = vectors.new_zeros(self.map.num_rows, vectors.shape[1])
        for column in range(self.map.rows_per_id):
            part = vectors
            if self._weights is not None:
                weights = self._weights[:, column, None]
                part = vectors * (weights.square() if squared else weights)
            out.index_add_(0, self._rows[:, column], part)
        return out

    def fit(
        self,
        vectors: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        start: torch.Tensor | None = None,
        steps: int = 12,
    ) -> torch.Tensor:
        """Rows C (num_rows, d) that minimize sum_i weights_i |vectors_i - (A C)_i|^2, by conjugate gradients.

        With one row per id this is exactly the weighted mean of the members. A row without members keeps its value in
        `start` (num_rows, d), zero by default.
        """
        w = torch.ones(len(vectors), 1) if weights is None else weights.float()[:, None]
        mass = self.collapse(w, squared=True)
        scale = torch.where(mass > 0, 1 / mass.clamp_min(TINY), 0.0)
        rows = self.collapse(vectors * w) * scale
        if self.map.rows_per_id == 1:
            return rows if start is None else torch.where(mass > 0, rows, start)
        if start is not None:
            rows = start
        ridge = 1e-6 * mass  # resolves how rows that always occur together split a vector
        residual = self.collapse(w * (vectors - self.expand(rows))) - ridge * rows
        return conjugate_gradients(
            rows, residual, lambda p: self.collapse(w * self.expand(p)) + ridge * p, scale, steps
        )


def conjugate_gradients(
    x: torch.Tensor,
    residual: torch.Tensor,
    image: Callable[[torch.Tensor], torch.Tensor],
    inverse: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Preconditioned conjugate gradients of one symmetric system in all entries of x (rows, d)."""
    direction, rho = torch.zeros_like(x), None
    for _ in range(steps):
        z = residual * inverse
        rho_old, rho = rho, (residual * z).sum(dtype=torch.float64)
        direction = z if rho_old is None else z + direction * (rho / rho_old.clamp_min(TINY)).float()
        moved = image(direction)
        length = (rho / (direction * moved).sum(dtype=torch.float64).clamp_min(TINY)).float()
        x = x + length * direction
        residual = residual - length * moved
    return x
