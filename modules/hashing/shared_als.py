"""Factorization whose ids share rows: the weighted least squares of `als`, restricted to tables of fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from recpress.modules.als.als import check, initial_rows
from recpress.modules.als.auto import item_weights
from recpress.modules.als.interactions import CSR
from recpress.modules.als.side import Scales
from recpress.modules.als.solvers import Chunk, loss_of
from recpress.modules.config import ALSParameters
from recpress.modules.hashing.id_map import IdMap

_TINY = 1e-30


class SharedRows:
    """The vectors of ids as sums of the rows of a smaller table: X = A C with A (num_ids, num_rows) from a map."""

    def __init__(self, id_map: IdMap) -> None:
        self.map = id_map
        self._rows = id_map.rows.long()
        self._weights = None if id_map.weights is None else id_map.weights.float()

    def expand(self, rows: torch.Tensor) -> torch.Tensor:
        """A C: (num_rows, d) -> (num_ids, d)."""
        if self.map.ways == 1 and self._weights is None:
            return rows[self._rows[:, 0]]
        return F.embedding_bag(self._rows, rows, mode="sum", per_sample_weights=self._weights)

    def collapse(self, vectors: torch.Tensor, *, squared: bool = False) -> torch.Tensor:
        """A'V: (num_ids, d) -> (num_rows, d); with the squares of A's entries where asked for."""
        out = vectors.new_zeros(self.map.num_rows, vectors.shape[1])
        for way in range(self.map.ways):
            part = vectors
            if self._weights is not None:
                weights = self._weights[:, way, None]
                part = vectors * (weights.square() if squared else weights)
            out.index_add_(0, self._rows[:, way], part)
        return out

    def fit(
        self,
        vectors: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        start: torch.Tensor | None = None,
        steps: int = 12,
    ) -> torch.Tensor:
        """Rows C (num_rows, d) that minimise sum_i weights_i |vectors_i - (A C)_i|^2, by conjugate gradients.

        For one row an id it is the weighted mean of the members, exactly. A row without members is as in `start`
        (num_rows, d), by default zero.
        """
        w = torch.ones(len(vectors), 1) if weights is None else weights.float()[:, None]
        mass = self.collapse(w, squared=True)
        scale = torch.where(mass > 0, 1 / mass.clamp_min(_TINY), 0.0)
        rows = self.collapse(vectors * w) * scale
        if self.map.ways == 1:
            return rows if start is None else torch.where(mass > 0, rows, start)
        if start is not None:
            rows = start
        ridge = 1e-6 * mass  # rows that always come together leave their split open
        residual = self.collapse(w * (vectors - self.expand(rows))) - ridge * rows
        return _cg(rows, residual, lambda p: self.collapse(w * self.expand(p)) + ridge * p, scale, steps)


@dataclass
class SharedFactors:
    """Rows of both tables, (rows, d) each, with the maps that the ids reach them by."""

    user_rows: torch.Tensor
    item_rows: torch.Tensor
    user_map: IdMap
    item_map: IdMap

    @property
    def users(self) -> torch.Tensor:
        """Vectors of all users, (num_users, d)."""
        return SharedRows(self.user_map).expand(self.user_rows)

    @property
    def items(self) -> torch.Tensor:
        """Vectors of all items, (num_items, d)."""
        return SharedRows(self.item_map).expand(self.item_rows)


class SharedALS:
    """Alternating least squares over the rows of two shared tables.

    The objective is that of `ALSParameters`, a vector's regularization that of its id; the vectors are confined to
    X = A C. So it compares with the full factorization's, which bounds it from below. Rows that share make one linear
    system of a side, which is solved by conjugate gradients, preconditioned by its diagonal. One process; memory: the
    interactions twice, and some (ids, d) matrices.

    Args:
        by_user, by_item: all interactions, `InteractionBuilder.build`'s of a world of one.
    """

    def __init__(self, config: ALSParameters, by_user: CSR, by_item: CSR, user_map: IdMap, item_map: IdMap) -> None:
        check(config)
        for side, csr, id_map in (("user", by_user, user_map), ("item", by_item, item_map)):
            if csr.num_rows != id_map.num_ids:
                raise ValueError(f"{side} map: covers {id_map.num_ids} ids, expected {csr.num_rows}")
        self.config, self.user_map, self.item_map = config, user_map, item_map
        weights = None
        if config.item_exponent:
            weights = item_weights(config, np.diff(by_item.indptr))
        num_users, num_items = config.used_users or by_user.num_rows, config.used_items or by_item.num_rows
        self._users = _Side(config, by_user, num_items, user_map, Scales(others=weights))
        self._items = _Side(config, by_item, num_users, item_map, Scales(rows=weights))

    def fit(
        self,
        users: torch.Tensor | None = None,
        items: torch.Tensor | None = None,
        *,
        steps: int = 3,
        on_sweep: Callable[[int, float], None] | None = None,
    ) -> SharedFactors:
        """config.sweeps sweeps from the rows that fit vectors `users` and `items` (ids, d) best, or from random ones.

        Args:
            steps: of conjugate gradients, a side and a sweep.
            on_sweep: sees the number of the sweep, from 1, and the objective after it.
        """
        rows = []
        for side, start, shared in ((0, users, self._users.shared), (1, items, self._items.shared)):
            if start is None:
                random = initial_rows(self.config.seed, side, 0, shared.map.num_rows, self.config.factors)
                rows.append(torch.from_numpy(random))
            else:
                weights = (self._users, self._items)[side].degree.clamp_min(0.1)
                rows.append(shared.fit(start.float(), weights))
        user_rows, item_rows = rows
        for sweep in range(1, self.config.sweeps + 1):
            user_rows, _ = self._users.solve(user_rows, self._items.shared.expand(item_rows), steps)
            item_rows, objective = self._items.solve(item_rows, self._users.shared.expand(user_rows), steps)
            if on_sweep is not None:
                vectors = self._users.shared.expand(user_rows)
                on_sweep(sweep, objective + float((vectors.square().sum(1) * self._users.reg).sum()))
        return SharedFactors(user_rows, item_rows, self.user_map, self.item_map)


class _Side:
    def __init__(self, config: ALSParameters, csr: CSR, num_others: int, id_map: IdMap, scales: Scales) -> None:
        self.config, self.shared = config, SharedRows(id_map)
        self.indptr = torch.from_numpy(csr.indptr.astype(np.int32))
        self.indices = torch.from_numpy(csr.indices)
        self.weights: torch.Tensor | float = config.confidence
        if csr.values is not None or scales.rows is not None or scales.others is not None:
            weights = scales.of(csr, 0, len(csr.indices), 0, csr.num_rows)
            self.weights = torch.from_numpy(weights) * config.confidence
        self.degree = torch.from_numpy(np.diff(csr.indptr)).float()
        base = config.unobserved_weight * num_others
        self.reg = config.regularization * (self.degree + base) ** config.frequency_exponent

    def solve(self, rows: torch.Tensor, others: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
        """Rows after some steps of conjugate gradients, and the objective there less the other side's penalty."""
        w0, w, reg = self.config.unobserved_weight, self.weights, self.reg[:, None]
        vectors = self.shared.expand(rows)
        chunk = Chunk(self.indptr, self.indices, w, others, self.reg, vectors)
        gramian = w0 * (others.T @ others)

        def image(p: torch.Tensor) -> torch.Tensor:
            x = self.shared.expand(p)
            out = chunk.weighted_sum(chunk.dots(x) * w).addmm_(x, gramian).addcmul_(reg, x)
            return self.shared.collapse(out)

        ones = torch.ones(len(self.indices))
        target = self.shared.collapse(chunk.weighted_sum(ones * w + w0))
        squares = Chunk(self.indptr, self.indices, w, others.square(), self.reg, vectors)
        diagonal = squares.weighted_sum(ones * w).add_(gramian.diagonal()).add_(reg)
        inverse = 1 / self.shared.collapse(diagonal, squared=True).clamp_min(_TINY)
        rows = _cg(rows, target - image(rows), image, inverse, steps)
        vectors = self.shared.expand(rows)
        objective = loss_of(chunk.dots(vectors), w, w0) + float((vectors.square().sum(1) * self.reg).sum())
        return rows, objective + float((vectors.T @ vectors * gramian).sum())


def _cg(
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
        direction = z if rho_old is None else z + direction * (rho / rho_old.clamp_min(_TINY)).float()
        moved = image(direction)
        length = (rho / (direction * moved).sum(dtype=torch.float64).clamp_min(_TINY)).float()
        x = x + length * direction
        residual = residual - length * moved
    return x
