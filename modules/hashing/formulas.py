"""Hashing methods whose rows follow from the id by a formula: no counts, no embedding, no map to serve."""

from __future__ import annotations

import math

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap, universal_hash
from recpress.modules.hashing.table_stats import TableStats


def modulo(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: id mod rows (Weinberger et al. 2009, with the simplest hash function)."""
    ids = torch.arange(table.num_ids, dtype=torch.int32)
    return _computed(table, ids.remainder_(rows)[:, None], rows, config, "modulo")


def universal(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: `universal_hash` (Weinberger et al. 2009)."""
    return _computed(table, _hashed(table.num_ids, rows, config.seed, 1), rows, config, "universal")


def double(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Two rows of one table by two hashes, summed (Zhang et al. 2020). Few ids collide in both."""
    return _computed(table, _hashed(table.num_ids, rows, config.seed, 2), rows, config, "double")


def quotient_remainder(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Rows id mod k and k + floor(id / k), summed (Shi et al. 2020). No two ids collide in both.

    k is the largest number with k + ceil(ids / k) <= rows, so that as few ids as possible share a remainder.

    Raises:
        ValueError: no k fits the budget. The smallest budget is about 2 sqrt(ids).
    """
    k = _num_remainders(table.num_ids, rows)
    if k is None:
        raise ValueError(
            f"table {table.name!r}: a budget of {rows} rows is too small for 'quotient-remainder' of "
            f"{table.num_ids} ids, which needs about {2 * math.isqrt(table.num_ids) + 1}"
        )
    ids = torch.arange(table.num_ids, dtype=torch.int32)
    both = torch.stack([ids % k, ids // k + k], 1)
    return _computed(table, both, k + -(-table.num_ids // k), config, "quotient-remainder")


def _computed(table: TableStats, rows: torch.Tensor, num_rows: int, config: HashConfig, method: str) -> IdMap:
    return IdMap(
        rows=rows, num_rows=num_rows, method=method, vocabulary=table.vocabulary, computed=True, seed=config.seed
    )


def _hashed(num_ids: int, rows: int, seed: int, rows_per_id: int) -> torch.Tensor:
    """`universal_hash` of all ids, in blocks, so that temporaries stay small."""
    found = torch.empty(num_ids, rows_per_id, dtype=torch.int32)
    for first in range(0, num_ids, 1 << 22):
        ids = torch.arange(first, min(first + (1 << 22), num_ids))
        found[first : first + len(ids)] = universal_hash(ids, rows, seed, rows_per_id)
    return found


def _num_remainders(ids: int, rows: int) -> int | None:
    """The largest k with k + ceil(ids / k) <= rows.

    For integers this is k (rows - k) >= ids, so k is the larger root of the quadratic, rounded down.
    """
    square = rows * rows - 4 * ids
    if square < 0:
        return None
    k = (rows + math.isqrt(square)) // 2
    return k if k * (rows - k) >= ids else None
