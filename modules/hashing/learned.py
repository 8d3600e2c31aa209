"""The learned hash function, from counts and embedding, and plain k-means of the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.additive import additive_rows
from recpress.modules.hashing.frequency import exclusive_rows, most_frequent
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.k_means import k_means
from recpress.modules.hashing.table_stats import TableStats, require_counts, require_embedding
from recpress.modules.hashing.two_row import two_row_dictionary
from recpress.modules.row_source import RowSource, blocks, gather_rows


def learned(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Frequent ids get exclusive rows; the others share rows with similar ids (Ghaemmaghami et al. 2022).

    Minimizes the weighted distortion sum_i w_i |v_i - c_row(i)|^2 over maps onto `rows` rows, with w_i = count_i **
    count_exponent. The share of exclusive rows is part of this problem: an id gets a row to itself if that gains more
    than the cheapest merge of two rows costs (`k_means.lloyd`). Rare ids that barely move the row's center may still
    join it. A `config.exclusive_share` >= 0 sets the share by hand: the floor(exclusive_share * rows) most frequent
    ids get exclusive rows, and the rest is clustered.

    Of ids that never occur and have equal vectors, such as the zeros of a factorization, one is clustered. The others
    get the rows that are left, or its row.

    With `config.rows_per_id` 2, an id is the weighted sum of two rows (`two_row_dictionary`), or, without
    `config.row_weights`, their sum (`additive_rows`).
    """
    counts, embedding = require_counts(table, "learned"), require_embedding(table, "learned")
    weights = counts.float() ** config.count_exponent
    if config.rows_per_id == 2:
        return _two_rows(table, embedding, weights, rows, config)
    exclusive = exclusive_rows(table, rows, config.exclusive_share) if config.exclusive_share >= 0 else 0
    assignment = torch.empty(table.num_ids, dtype=torch.int32)
    shared = torch.ones(table.num_ids, dtype=torch.bool)
    if exclusive:
        top = most_frequent(counts, exclusive)
        assignment[top] = torch.arange(exclusive, dtype=torch.int32)
        shared[top] = False
    if exclusive < rows:
        idle = _Idle.of(table, embedding, shared)
        tail = (shared & ~idle.ids).nonzero()[:, 0]
        k = min(rows - exclusive, len(tail))
        found = k_means(
            _rows(embedding, tail),
            idle.joined(weights)[tail],
            k,
            seed=config.seed,
            iterations=config.iterations,
            name=table.name,
            progress=table.progress,
        )
        assignment[tail] = found.assignment + exclusive
        idle.place(assignment, exclusive + k, rows)
    return IdMap(
        rows=assignment[:, None], num_rows=rows, method="learned", vocabulary=table.vocabulary, seed=config.seed
    )


def cluster(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: its cluster by k-means of the embedding. Every id weighs the same."""
    embedding = require_embedding(table, "cluster")
    idle = _Idle.of(table, embedding, torch.ones(table.num_ids, dtype=torch.bool))
    ids = (~idle.ids).nonzero()[:, 0]
    weights = idle.joined(torch.ones(table.num_ids))[ids] if len(ids) < table.num_ids else None
    k = min(rows, len(ids))
    found = k_means(
        _rows(embedding, ids),
        weights,
        k,
        seed=config.seed,
        iterations=config.iterations,
        name=table.name,
        progress=table.progress,
    )
    assignment = torch.empty(table.num_ids, dtype=torch.int32)
    assignment[ids] = found.assignment
    idle.place(assignment, k, rows)
    return IdMap(
        rows=assignment[:, None], num_rows=rows, method="cluster", vocabulary=table.vocabulary, seed=config.seed
    )


def _two_rows(table: TableStats, embedding: RowSource, weights: torch.Tensor, rows: int, config: HashConfig) -> IdMap:
    if config.exclusive_share >= 0:
        raise ValueError(
            f"table {table.name!r}: exclusive_share is {config.exclusive_share}, expected -1 with two rows per id"
        )
    settings: Any = {
        "seed": config.seed,
        "iterations": config.iterations,
        "name": table.name,
        "progress": table.progress,
    }
    idle = _Idle.of(table, embedding, torch.ones(table.num_ids, dtype=torch.bool))
    ids = (~idle.ids).nonzero()[:, 0]
    place = torch.empty(table.num_ids, dtype=torch.int64)  # of each id among those that are clustered
    place[ids] = torch.arange(len(ids))
    place[idle.ids] = place[idle.like]
    source, k, found_weights = _rows(embedding, ids), min(rows, len(ids)), None
    weights = idle.joined(weights)[ids]
    if config.row_weights:
        pairs = two_row_dictionary(source, weights, k, **settings)
        found_rows, found_weights = pairs.rows, pairs.weights[place]
    else:
        found_rows = additive_rows(source, weights, k, **settings).rows
    return IdMap(
        rows=found_rows[place],
        num_rows=rows,
        weights=found_weights,
        method="learned",
        vocabulary=table.vocabulary,
        seed=config.seed,
    )


@dataclass(frozen=True)
class _Idle:
    """Ids that never occur and have the vector of the id `like`, which never occurs either."""

    ids: torch.Tensor
    """(num_ids,) bool, without `like`."""
    like: int

    @classmethod
    def of(cls, table: TableStats, embedding: RowSource, among: torch.Tensor) -> _Idle:
        """Those of the ids in the mask `among`."""
        found = torch.zeros(table.num_ids, dtype=torch.bool)
        if table.counts is None:
            return cls(found, 0)
        unseen = among & (table.counts == 0)
        if int(unseen.sum()) < 2:
            return cls(found, 0)
        like = int(unseen.nonzero()[0])
        vector = gather_rows(embedding, torch.tensor([like]))
        for first, block in blocks(embedding, table.name, (0, table.num_ids), (0, embedding.shape[1])):
            part = slice(first, first + len(block))
            found[part] = unseen[part] & (block == vector).all(1)
        found[like] = False
        return cls(found, like)

    def joined(self, weights: torch.Tensor) -> torch.Tensor:
        """The weights (num_ids,), with those of the ids at `like`."""
        joined = weights.clone()
        joined[self.like] += weights[self.ids].sum()
        return joined

    def place(self, assignment: torch.Tensor, used: int, rows: int) -> None:
        """Give the ids the rows from `used` on, in turn; the row of `like` if there are none."""
        if used == rows:
            assignment[self.ids] = assignment[self.like].clone()
        else:
            count = int(self.ids.sum())
            assignment[self.ids] = torch.arange(count, dtype=torch.int32).remainder(rows - used) + used


def _rows(source: RowSource, ids: torch.Tensor) -> RowSource:
    """The rows of ascending ids."""
    return source if len(ids) == source.shape[0] else _Rows(source, ids)


class _Rows:
    """A RowSource of some rows of a matrix, given by ascending ids."""

    def __init__(self, source: RowSource, ids: torch.Tensor) -> None:
        self._source, self._ids = source, ids
        self.shape = (len(ids), source.shape[1])

    def __getitem__(self, index: Any) -> Any:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        ids = self._ids[rows]
        found = self._source[ids if isinstance(self._source, torch.Tensor) else ids.numpy()]
        return found[:, columns]
