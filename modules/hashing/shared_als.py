"""Factorization with shared rows: the weighted least squares of `als`, restricted to tables with fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.als.auto import item_weights
from recpress.modules.als.factorization import check, initial_rows
from recpress.modules.als.half_sweep import Scales
from recpress.modules.als.interactions import CSR
from recpress.modules.als.solvers import Chunk, loss_of
from recpress.modules.config import ALSParameters
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import TINY, MapMatrix, conjugate_gradients


@dataclass
class SharedFactors:
    """Rows of both tables, (rows, d) each, and their id maps."""

    user_rows: torch.Tensor
    item_rows: torch.Tensor
    user_map: IdMap
    item_map: IdMap

    @property
    def users(self) -> torch.Tensor:
        """Vectors of all users, (num_users, d)."""
        return MapMatrix(self.user_map).expand(self.user_rows)

    @property
    def items(self) -> torch.Tensor:
        """Vectors of all items, (num_items, d)."""
        return MapMatrix(self.item_map).expand(self.item_rows)


class SharedALS:
    """Alternating least squares over the shared rows of users and items.

    The objective is that of `ALSParameters`, with vectors restricted to X = A C (`MapMatrix`). So the full
    factorization bounds it from below. Shared rows couple all equations of a side; conjugate gradients with a diagonal
    preconditioner solve them. Runs in one process. Memory: the interactions twice, and a few (ids, d) matrices.

    Args:
        by_user, by_item: all interactions, from `InteractionBuilder.build` at world size 1.
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
        self._users = _HalfSweep(config, by_user, num_items, user_map, Scales(others=weights))
        self._items = _HalfSweep(config, by_item, num_users, item_map, Scales(rows=weights))

    def fit(
        self,
        users: torch.Tensor | None = None,
        items: torch.Tensor | None = None,
        *,
        steps: int = 3,
        on_sweep: Callable[[int, float], None] | None = None,
    ) -> SharedFactors:
        """Run config.sweeps sweeps from random rows, or from those that fit vectors `users` and `items` (ids, d) best.

        Args:
            steps: conjugate-gradient steps per side and sweep.
            on_sweep: called with the number of the sweep, from 1, and the objective after it.
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


class _HalfSweep:
    def __init__(self, config: ALSParameters, csr: CSR, num_others: int, id_map: IdMap, scales: Scales) -> None:
        self.config, self.shared = config, MapMatrix(id_map)
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
        """Rows after some conjugate-gradient steps, and the objective without the other side's penalty."""
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
        inverse = 1 / self.shared.collapse(diagonal, squared=True).clamp_min(TINY)
        rows = conjugate_gradients(rows, target - image(rows), image, inverse, steps)
        vectors = self.shared.expand(rows)
        objective = float(loss_of(chunk.dots(vectors), w, w0)) + float((vectors.square().sum(1) * self.reg).sum())
        return rows, objective + float((vectors.T @ vectors * gramian).sum())
