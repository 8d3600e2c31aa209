"""The learned hash function, from counts and embedding, and plain k-means of the embedding."""

from __future__ import annotations

from typing import Any

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.additive import additive_rows
from recpress.modules.hashing.frequency import exclusive_rows, most_frequent
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.k_means import k_means
from recpress.modules.hashing.table_stats import TableStats, require_counts, require_embedding
from recpress.modules.hashing.two_row import two_row_dictionary
from recpress.modules.row_source import RowSource


def learned(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Frequent ids get exclusive rows; the others share rows with similar ids (Ghaemmaghami et al. 2022).

    Minimizes the weighted distortion sum_i w_i |v_i - c_row(i)|^2 over maps onto `rows` rows, with w_i = count_i **
    count_exponent. The share of exclusive rows is part of this problem: an id gets a row to itself if that gains more
    than the cheapest merge of two rows costs (`k_means.lloyd`). Rare ids that barely move the row's center may still
    join it. A `config.exclusive_share` >= 0 sets the share by hand: the floor(exclusive_share * rows) most frequent
    ids get exclusive rows, and the rest is clustered.

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
        tail = shared.nonzero()[:, 0]
        found = k_means(
            _Rows(embedding, tail) if exclusive else embedding,
            weights[tail] if exclusive else weights,
            min(rows - exclusive, len(tail)),
            seed=config.seed,
            iterations=config.iterations,
            name=table.name,
            progress=table.progress,
        )
        assignment[tail] = found.assignment + exclusive
    return IdMap(
        rows=assignment[:, None], num_rows=rows, method="learned", vocabulary=table.vocabulary, seed=config.seed
    )


def cluster(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: its cluster by k-means of the embedding. Every id weighs the same."""
    found = k_means(
        require_embedding(table, "cluster"),
        None,
        rows,
        seed=config.seed,
        iterations=config.iterations,
        name=table.name,
        progress=table.progress,
    )
    return IdMap(
        rows=found.assignment[:, None], num_rows=rows, method="cluster", vocabulary=table.vocabulary, seed=config.seed
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
    found_weights = None
    if config.row_weights:
        pairs = two_row_dictionary(embedding, weights, rows, **settings)
        found_rows, found_weights = pairs.rows, pairs.weights
    else:
        found_rows = additive_rows(embedding, weights, rows, **settings).rows
    return IdMap(
        rows=found_rows,
        num_rows=rows,
        weights=found_weights,
        method="learned",
        vocabulary=table.vocabulary,
        seed=config.seed,
    )


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
