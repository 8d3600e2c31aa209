"""The hashing trick by the remainder."""

from __future__ import annotations

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import IdTable


def modulo(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: id mod rows (Weinberger et al. 2009, with the plainest of hash functions). Computed."""
    ids = torch.arange(table.num_ids, dtype=torch.int32)
    return IdMap(
        rows=ids.remainder_(rows)[:, None],
        num_rows=rows,
        method="modulo",
        vocabulary=table.vocabulary,
        computed=True,
        seed=config.seed,
    )
