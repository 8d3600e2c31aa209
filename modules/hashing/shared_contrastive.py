"""Contrastive factorization with shared rows: the vector of an id is the sum of rows that its map gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.interactions import CSR
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import Run, item_lengths
from recpress.modules.contrastive.row_adam import RowAdam
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.shared_als import SharedFactors


class MappedRows(RowAdam):
    """The rows of an id map, read as unit vectors of ids."""

    def __init__(self, rows: torch.Tensor, id_map: IdMap) -> None:
        super().__init__(rows)
        self.map = id_map
        self._rows = id_map.rows.long()
        self._weights = None if id_map.weights is None else id_map.weights.float()

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self._rows.index_select(0, ids)
        weights = None if self._weights is None else self._weights.index_select(0, ids)
        return F.embedding_bag(rows, self.rows, mode="sum", per_sample_weights=weights)

    def units(self) -> torch.Tensor:
        return F.normalize(MapMatrix(self.map).expand(self.rows))

    def move(self, ids: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        rows, place = torch.unique(self._rows.index_select(0, ids), return_inverse=True)
        collapsed = gradient.new_zeros(len(rows), gradient.shape[1])
        for column in range(self.map.rows_per_id):
            part = gradient
            if self._weights is not None:
                part = gradient * self._weights[:, column].index_select(0, ids)[:, None]
            collapsed.index_add_(0, place[:, column], part)
        super().move(rows, collapsed, rate)


def fit_shared(
    config: ContrastiveConfig,
    by_user: CSR,
    by_item: CSR,
    user_map: IdMap,
    item_map: IdMap,
    users: torch.Tensor,
    items: torch.Tensor,
    *,
    epochs: int,
    rate: float = 0.5,
) -> SharedFactors:
    """Train shared rows, from those that fit the directions of `users` and `items` (ids, d) best. One process.

    The weights of the returned maps give the vectors the lengths of a factorization with one row per id. Without
    weights, a row has the mean length of its ids; an id with several rows has the length that their sum gives.

    Args:
        epochs: 0 returns the rows that fit best.
        rate: initial learning rate, in units of that of the config: the rows start near their best.
    """
    tables = []
    for vectors, csr, id_map in ((users, by_user, user_map), (items, by_item, item_map)):
        degrees = torch.from_numpy(csr.indptr[1:] - csr.indptr[:-1]).float()
        tables.append(MappedRows(MapMatrix(id_map).fit(F.normalize(vectors.float()), degrees.clamp_min(0.1)), id_map))
    if epochs:
        tuned = replace(config, epochs=epochs, patience=0, learning_rate=config.learning_rate * rate)
        exchange = Exchange(None, torch.device("cpu"))
        Run(tuned, by_user, by_item, len(users), len(items), exchange, tables=(tables[0], tables[1])).train()
    lengths = torch.ones(len(users), 1), item_lengths(config, np.diff(by_item.indptr))
    maps = [_with_lengths(table, wanted) for table, wanted in zip(tables, lengths, strict=True)]
    return SharedFactors(tables[0].rows, tables[1].rows, *maps)


def _with_lengths(table: MappedRows, lengths: torch.Tensor) -> IdMap:
    """The map with weights that give the vectors of ids these lengths, (ids, 1); without weights, the rows change."""
    matrix = MapMatrix(table.map)
    if table.map.weights is None:
        if table.map.rows_per_id == 1:
            table.rows.copy_(F.normalize(table.rows).mul_(matrix.fit(lengths)))
        return table.map
    length = matrix.expand(table.rows).norm(dim=1, keepdim=True).clamp_min(1e-12)
    weights = (table.map.weights.float() / length * lengths).clamp_(-6e4, 6e4)
    return replace(table.map, weights=weights.to(table.map.weights.dtype))
