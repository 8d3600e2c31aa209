"""Rows of their own for the most frequent ids, double hashing for the rest."""

from __future__ import annotations

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.frequency import SHARE, most_frequent, private_rows
from recpress.modules.hashing.id_map import IdMap, universal_hash
from recpress.modules.hashing.problem import IdTable, need_counts


def hybrid(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """As `frequency`, but any other id has two of the shared rows, by two hashes, summed (Zhang et al. 2020).

    A private id names its row twice, so that its vector is twice that row; no weights have to be kept.
    """
    counts = need_counts(table, "hybrid")
    private = private_rows(table, rows, config.private if config.private >= 0 else SHARE)
    found = torch.empty(table.num_ids, 2, dtype=torch.int32)
    for first in range(0, table.num_ids, 1 << 22):
        ids = torch.arange(first, min(first + (1 << 22), table.num_ids))
        found[first : first + len(ids)] = universal_hash(ids, max(1, rows - private), config.seed, 2).add_(private)
    found[most_frequent(counts, private)] = torch.arange(private, dtype=torch.int32)[:, None]
    return IdMap(rows=found, num_rows=rows, method="hybrid", vocabulary=table.vocabulary, seed=config.seed)
