"""Compositional embeddings: a row for the quotient and one for the remainder."""

from __future__ import annotations

import math

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import IdTable


def quotient_remainder(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Rows id mod k and k + floor(id / k), summed (Shi et al. 2020): no two ids have both in common. Computed.

    k is the largest with k + ceil(ids / k) <= rows, so that as few ids as possible share a remainder.

    Raises:
        ValueError: no k meets the budget, which then is below about 2 sqrt(ids).
    """
    k = _remainders(table.num_ids, rows)
    if k is None:
        raise ValueError(
            f"table {table.name!r}: a budget of {rows} rows is too small for 'quotient-remainder' of "
            f"{table.num_ids} ids, which needs about {2 * math.isqrt(table.num_ids) + 1}"
        )
    ids = torch.arange(table.num_ids, dtype=torch.int32)
    return IdMap(
        rows=torch.stack([ids % k, ids // k + k], 1),
        num_rows=k + -(-table.num_ids // k),
        method="quotient-remainder",
        vocabulary=table.vocabulary,
        computed=True,
        seed=config.seed,
    )


def _remainders(ids: int, rows: int) -> int | None:
    """The largest k with k + ceil(ids / k) <= rows.

    k (rows - k) >= ids is the same condition for integers, so k is the larger root, rounded down.
    """
    square = rows * rows - 4 * ids
    if square < 0:
        return None
    k = (rows + math.isqrt(square)) // 2
    return k if k * (rows - k) >= ids else None
