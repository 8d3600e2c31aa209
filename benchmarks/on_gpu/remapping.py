"""Ids replaced by rows: ids a second, and what share of the memory's bandwidth that is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torchrec import JaggedTensor

from recpress.benchmarks.on_gpu.device import Ceilings, Job, seconds
from recpress.benchmarks.remap import FEATURES, KEYS, filled_mch
from recpress.benchmarks.synthetic_logs import keyed, random_ids, random_map
from recpress.modules.hashing.learned_hash import LearnedHash

ID_BYTES, ENTRY_BYTES = 8, 4


@torch.no_grad()
def rows(device: torch.device, best: Ceilings, tiny: bool) -> Iterator[dict[str, Any]]:
    """`useful` bytes are an id read, its entry of the map read, a row written. A map far larger than the cache moves a
    whole sector (32 bytes on NVIDIA's) for each entry of 4."""
    count = 1 << (12 if tiny else 23)
    for size in (1 << 12,) if tiny else (1_000_000, 100_000_000):
        per_key = size // FEATURES
        one_map = random_map(size, max(1, size // 10), 1)
        maps = {f"f{k}": random_map(per_key, max(1, per_key // 10), k) for k in range(FEATURES)}
        plain, packed = (LearnedHash({"f0": one_map}, packed=p).to(device) for p in (False, True))
        for_many = LearnedHash(maps).to(device)
        two = LearnedHash({"f0": random_map(size, max(1, size // 10), 1, rows_per_id=2)}).to(device)
        collisions = filled_mch(torch.arange(size, device=device), min(size, 1_000_000))
        for kind in ("uniform", "skewed"):
            ids = random_ids(kind, size, count, 2).to(device)
            jagged = {"t": JaggedTensor(values=ids, lengths=torch.ones_like(ids))}
            one, many = keyed(ids, ["f0"]), keyed(ids.remainder(per_key), KEYS)
            jobs: dict[str, tuple[Job, int]] = {  # name -> job, bytes of map and of result an id
                "LearnedHash": (partial(plain, one), ENTRY_BYTES + ID_BYTES),
                "TorchRec's collision module": (partial(collisions, jagged), ENTRY_BYTES + ID_BYTES),
                "torch.remainder": (partial(torch.remainder, ids, 1000), ID_BYTES),
                "26 features at once": (partial(for_many, many), ENTRY_BYTES + ID_BYTES),
                "two rows per id": (partial(two, one), 2 * (ENTRY_BYTES + ID_BYTES)),
                "bit-packed": (partial(packed, one), ENTRY_BYTES + ID_BYTES),
            }
            for name, (job, more) in jobs.items():
                took = seconds(job, device, runs=7)
                useful = len(ids) * (ID_BYTES + more)
                yield {
                    "map, ids": size,
                    "ids": kind,
                    "what": name,
                    "M ids/s": len(ids) / took / 1e6,
                    "useful GB/s": useful / took / 1e9,
                    "of copy %": 100 * useful / took / best.copy,
                }
