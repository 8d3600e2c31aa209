"""Random id maps, and their dense matrices."""

from __future__ import annotations

import torch

from recpress.modules.hashing.id_map import IdMap


def random_map(count: int, rows: int, rows_per_id: int, seed: int = 1) -> IdMap:
    generator = torch.Generator().manual_seed(seed)
    return IdMap(
        rows=torch.randint(rows, (count, rows_per_id), generator=generator, dtype=torch.int32),
        num_rows=rows,
        weights=None if rows_per_id == 1 else torch.rand(count, rows_per_id, generator=generator) + 0.1,
    )
