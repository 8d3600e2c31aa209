"""Tables with counts and embeddings for the tests of hashing methods."""

from __future__ import annotations

import torch

from recpress.modules.hashing.table_stats import TableStats


def made(num_ids: int, seed: int = 0, **more: object) -> TableStats:
    generator = torch.Generator().manual_seed(seed)
    given_ = {
        "counts": torch.randint(1, 1000, (num_ids,), generator=generator).float(),
        "embedding": torch.randn(num_ids, 4, generator=generator),
        "vocabulary": "v1",
    }
    return TableStats(name="items", num_ids=num_ids, **(given_ | more))
