"""Hashing methods that give the most frequent ids exclusive rows."""

from __future__ import annotations

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap, universal_hash
from recpress.modules.hashing.table_stats import TableStats, require_counts

DEFAULT_SHARE = 0.5
"""Share of exclusive rows if the configuration sets none."""


def frequency(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """The e most frequent ids get rows 0 to e - 1; any other id gets row e + id mod (rows - e).

    e = floor(exclusive_share * rows), with a share of 0.5 if `config.exclusive_share` is negative. The lower id wins
    a tie.
    """
    counts = require_counts(table, "frequency")
    exclusive = _exclusive(table, rows, config)
    found = torch.arange(table.num_ids, dtype=torch.int32).remainder_(max(1, rows - exclusive)).add_(exclusive)
    found[most_frequent(counts, exclusive)] = torch.arange(exclusive, dtype=torch.int32)
    return IdMap(rows=found[:, None], num_rows=rows, method="frequency", vocabulary=table.vocabulary, seed=config.seed)


def hybrid(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """As `frequency`, but any other id gets two of the shared rows by double hashing (Zhang et al. 2020).

    An id with an exclusive row names it twice, so its vector is twice that row, and the map needs no weights.
    """
    counts = require_counts(table, "hybrid")
    exclusive = _exclusive(table, rows, config)
    found = torch.empty(table.num_ids, 2, dtype=torch.int32)
    for first in range(0, table.num_ids, 1 << 22):
        ids = torch.arange(first, min(first + (1 << 22), table.num_ids))
        shared = universal_hash(ids, max(1, rows - exclusive), config.seed, 2)
        found[first : first + len(ids)] = shared.add_(exclusive)
    found[most_frequent(counts, exclusive)] = torch.arange(exclusive, dtype=torch.int32)[:, None]
    return IdMap(rows=found, num_rows=rows, method="hybrid", vocabulary=table.vocabulary, seed=config.seed)


def _exclusive(table: TableStats, rows: int, config: HashConfig) -> int:
    return exclusive_rows(table, rows, config.exclusive_share if config.exclusive_share >= 0 else DEFAULT_SHARE)


def exclusive_rows(table: TableStats, rows: int, share: float) -> int:
    """floor(share * rows).

    Raises:
        ValueError: the share is outside [0, 1], or leaves no row for the other ids.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"table {table.name!r}: exclusive_share is {share}, expected 0 to 1")
    exclusive = int(share * rows)
    if exclusive == rows < table.num_ids:
        raise ValueError(
            f"table {table.name!r}: {exclusive} exclusive rows of {rows} leave none for the other "
            f"{table.num_ids - exclusive} ids; lower exclusive_share from {share}"
        )
    return exclusive


def most_frequent(counts: torch.Tensor, number: int) -> torch.Tensor:
    """The `number` ids with the highest counts, most frequent first: (number,) int64. The lower id wins a tie."""
    return torch.sort(counts, descending=True, stable=True).indices[:number]
