"""Double hashing."""

from __future__ import annotations

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import IdTable
from recpress.modules.hashing.universal import hashed


def double(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Two rows of one table by two hashes, summed (Zhang et al. 2020): few ids share both. Computed."""
    return hashed(table, rows, config, "double", 2)
