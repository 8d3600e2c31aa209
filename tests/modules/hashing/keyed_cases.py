"""Id maps and batches, and their rows by a plain loop."""

from __future__ import annotations

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.hashing.id_map import IdMap


def id_map(num_ids: int, num_rows: int, rows_per_id: int = 1, weighted: bool = False, seed: int = 0) -> IdMap:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, num_rows, (num_ids, rows_per_id)).astype(np.int32))
    kind = np.float16 if seed else np.float32
    weights = torch.from_numpy(rng.random((num_ids, rows_per_id)).astype(kind)) if weighted else None
    return IdMap(rows=rows, num_rows=num_rows, weights=weights, seed=seed)


def batch(bags: dict[str, list[list[int]]], weights: list[float] | None = None) -> KeyedJaggedTensor:
    """bags: feature -> the ids of each row of the batch."""
    values = [i for rows in bags.values() for row in rows for i in row]
    lengths = [len(row) for rows in bags.values() for row in rows]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=None if weights is None else torch.tensor(weights),
    )
