"""Rows of their own for the most frequent ids."""

from __future__ import annotations

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import IdTable, need_counts

SHARE = 0.5
"""Share of the rows that are private where the configuration leaves it open."""


def frequency(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """The p most frequent ids have rows 0 to p - 1, any other id has row p + id mod (rows - p).

    p = floor(private * rows), with private 0.5 where `config.private` is below 0. Ties go to the lower id.
    """
    counts = need_counts(table, "frequency")
    private = private_rows(table, rows, config.private if config.private >= 0 else SHARE)
    found = torch.arange(table.num_ids, dtype=torch.int32).remainder_(max(1, rows - private)).add_(private)
    found[most_frequent(counts, private)] = torch.arange(private, dtype=torch.int32)
    return IdMap(rows=found[:, None], num_rows=rows, method="frequency", vocabulary=table.vocabulary, seed=config.seed)


def private_rows(table: IdTable, rows: int, share: float) -> int:
    """floor(share * rows); raises ValueError where the share is above 1 or leaves no row for the other ids."""
    if not 0 <= share <= 1:
        raise ValueError(f"table {table.name!r}: private rows are a share of {share} of all, expected 0 to 1")
    private = int(share * rows)
    if private == rows < table.num_ids:
        raise ValueError(
            f"table {table.name!r}: {private} private rows of {rows} leave none for the other "
            f"{table.num_ids - private} ids; lower the share of {share}"
        )
    return private


def most_frequent(counts: torch.Tensor, number: int) -> torch.Tensor:
    """The `number` ids of the highest counts, ties by the lower id: (number,) int64, the most frequent first."""
    return torch.sort(counts, descending=True, stable=True).indices[:number]
