"""The negatives of a held-out part: for each held-out pair, items that the user never met."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

MAX_OFFSET = 2**31 - 1
"""Values that one Arrow array of lists can have: its offsets are int32."""


def draw_unseen(
    rng: np.random.Generator, rows: int, num_items: int, count: int, owners: np.ndarray, met: np.ndarray
) -> np.ndarray:
    """Uniform draws without replacement from the items that a row's user never met.

    Args:
        rows: how many rows to draw for.
        owners: (n,) row of each met item.
        met: (n,) the items that the rows' users have met, the held-out one among them.

    Returns:
        (rows, count) int64, each row ascending. Each row needs `count` unmet items, or this never ends;
        callers check.
    """
    taken = distinct(owners * num_items + met)  # sorted keys (row, item)
    drawn = [np.empty(0, dtype=np.int64)]
    need = np.full(rows, count)
    while need.any():
        # Exactly as many as are missing: to draw more and cut would prefer some items.
        owner = np.repeat(np.arange(rows), need)
        keys = distinct(owner * num_items + rng.integers(0, num_items, owner.size))
        if taken.size:
            keys = keys[taken[np.minimum(np.searchsorted(taken, keys), taken.size - 1)] != keys]
        drawn.append(keys)
        taken = np.sort(np.concatenate((taken, keys)))
        need = need - np.bincount(keys // num_items, minlength=rows)
    return np.sort(np.concatenate(drawn)).reshape(rows, count) % num_items


def distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct integers of `keys`, sorted. np.unique hashes integers since numpy 2.3: 20 times slower here."""
    keys = np.sort(keys)
    return keys[np.concatenate(([True], keys[1:] != keys[:-1]))] if keys.size else keys


def negatives_table(users: np.ndarray, items: np.ndarray, negatives: np.ndarray, kind: pa.DataType) -> pa.Table:
    """`user_id`, `pos_item_id`, `negatives` as the convention of logs names them.

    Args:
        users, items: (rows,) int64.
        negatives: (rows, count) int64. The lists become several chunks where they have more than MAX_OFFSET values.
        kind: type of the ids in the table.
    """
    count = negatives.shape[1]
    step = max(1, MAX_OFFSET // max(1, count))
    chunks = []
    for first in range(0, len(users), step):
        part = negatives[first : first + step]
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(count)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.reshape(-1)).cast(kind)))
    return pa.table(
        [pa.array(users).cast(kind), pa.array(items).cast(kind), pa.chunked_array(chunks, pa.list_(kind))],
        names=["user_id", "pos_item_id", "negatives"],
    )
