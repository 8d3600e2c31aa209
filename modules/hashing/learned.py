"""The learned hash function: access frequency and embedding together."""

from __future__ import annotations

from typing import Any

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.clustering import cluster
from recpress.modules.hashing.frequency import most_frequent, private_rows
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.pairs import pair_rows
from recpress.modules.hashing.problem import IdTable, need_counts, need_embedding
from recpress.modules.rows import RowSource


def learned(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Frequent ids have rows that are theirs, the others share with ids like them (Ghaemmaghami et al. 2022).

    Minimises the weighted distortion sum_i w_i |v_i - c_row(i)|^2 over maps onto `rows` rows, w_i = count_i **
    config.power. What share of the rows frequent ids have for themselves is part of that: a row goes to one id as
    soon as what this gains is above what the cheapest merge of two rows costs (`clustering.lloyd`). Ids that are too
    rare to pull its centre away may still join it. `config.private` >= 0 sets the share by hand: floor(private *
    rows) rows go to the most frequent ids, which share with none, and the rest is clustered.
    """
    counts, embedding = need_counts(table, "learned"), need_embedding(table, "learned")
    weights = counts.float() ** config.power
    if config.ways == 2:
        if config.private >= 0:
            raise ValueError(
                f"table {table.name!r}: private is {config.private}, expected none (-1) with two rows an id"
            )
        pairs = pair_rows(
            embedding,
            weights,
            rows,
            seed=config.seed,
            iterations=config.iterations,
            name=table.name,
            progress=table.progress,
        )
        return IdMap(
            rows=pairs.rows,
            num_rows=rows,
            weights=pairs.weights,
            method="learned",
            vocabulary=table.vocabulary,
            seed=config.seed,
        )
    private = private_rows(table, rows, config.private) if config.private >= 0 else 0
    assignment = torch.empty(table.num_ids, dtype=torch.int32)
    shared = torch.ones(table.num_ids, dtype=torch.bool)
    if private:
        top = most_frequent(counts, private)
        assignment[top] = torch.arange(private, dtype=torch.int32)
        shared[top] = False
    if private < rows:
        tail = shared.nonzero()[:, 0]
        source = _Part(embedding, tail) if private else embedding
        found = cluster(
            source,
            weights[tail] if private else weights,
            min(rows - private, len(tail)),
            seed=config.seed,
            iterations=config.iterations,
            name=table.name,
            progress=table.progress,
        )
        assignment[tail] = found.assignment + private
    return IdMap(
        rows=assignment[:, None], num_rows=rows, method="learned", vocabulary=table.vocabulary, seed=config.seed
    )


class _Part:
    """Some rows of a matrix, given by their ids in order: a RowSource."""

    def __init__(self, source: RowSource, ids: torch.Tensor) -> None:
        self._source, self._ids = source, ids
        self.shape = (len(ids), source.shape[1])

    def __getitem__(self, index: Any) -> Any:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        ids = self._ids[rows]
        found = self._source[ids if isinstance(self._source, torch.Tensor) else ids.numpy()]
        return found[:, columns]
