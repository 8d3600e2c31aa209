"""The hashing trick by a seeded hash."""

from __future__ import annotations

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap, universal_hash
from recpress.modules.hashing.problem import IdTable


def universal(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: `universal_hash` (Weinberger et al. 2009). Computed."""
    return hashed(table, rows, config, "universal", 1)


def hashed(table: IdTable, rows: int, config: HashConfig, method: str, ways: int) -> IdMap:
    """The map that gives each id `ways` rows by `universal_hash`, in blocks, so that temporaries stay small."""
    found = torch.empty(table.num_ids, ways, dtype=torch.int32)
    for first in range(0, table.num_ids, 1 << 22):
        ids = torch.arange(first, min(first + (1 << 22), table.num_ids))
        found[first : first + len(ids)] = universal_hash(ids, rows, config.seed, ways)
    return IdMap(rows=found, num_rows=rows, method=method, vocabulary=table.vocabulary, computed=True, seed=config.seed)
