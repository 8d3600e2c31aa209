"""A small two-tower model and its batches, for tests of the trainer. Every rank makes its own part."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from recpress.data.stream.batch import ITEM, USER, Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard

CPU = torch.device("cpu")
USERS, ITEMS, DIM, ROWS, NEGATIVES = 40, 30, 8, 16, 3


def factors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return tuple(rng.normal(0, 0.5, (n, DIM)).astype(np.float32) for n in (USERS, ITEMS))


def config(strategy: str = "frozen", kind: str = "residual", **loss: object) -> TwoTowerConfig:
    return TwoTowerConfig(
        tables=TablesConfig(strategy=strategy, dim=DIM, residual_dim=4),
        towers=TowersConfig(kind=kind, hidden=(12,), dim=DIM),
        loss=LossConfig(**loss),
    )


def sides(dim: int | None = DIM) -> tuple[SideSpec, SideSpec]:
    return SideSpec(key=USER, rows=USERS, dim=dim), SideSpec(key=ITEM, rows=ITEMS, dim=dim)


def keyed(key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([key], ids, lengths=torch.ones_like(ids, dtype=torch.int32), stride=len(ids))


def batches(epoch: int, first: int = 0, steps: int = 6, bad_step: int | None = None) -> list[Batch]:
    """This rank's batches: user u likes the items that are near u modulo the number of items."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * epoch + rank)
    made = []
    for step in range(steps):
        users = torch.randint(USERS, (ROWS,), generator=generator)
        positives = (users + torch.randint(3, (ROWS,), generator=generator)) % ITEMS
        negatives = torch.randint(ITEMS, (ROWS * NEGATIVES,), generator=generator)
        items = torch.cat([positives, negatives])
        label = torch.ones(ROWS)
        if step == bad_step:
            label[3] = torch.nan
        log_q = torch.full((len(items),), -float(np.log(ITEMS)))
        made.append(Batch(keyed(USER, users), keyed(ITEM, items), label, log_q))
    return made[first:]


def sharded(
    strategy: str = "frozen",
    kind: str = "residual",
    layout: str = "row_wise",
    total_steps: int = 12,
    device: torch.device = CPU,
    ema: float | None = None,
    **opt: object,
):
    """(DistributedModelParallel with factors loaded, its optimizer)."""
    torch.manual_seed(7)
    model = TwoTower(config(strategy, kind), *sides(), tables_device="meta")
    names = ("user", "item", "user_plus", "item_plus")
    dmp = shard(model, device, batch_size=ROWS, learning_rate=0.1, sharding_types=dict.fromkeys(names, layout))
    if strategy != "random":
        dmp.module.load_factors(*factors())
    return dmp, TrainOptimizer(dmp, OptimizerConfig(**{"learning_rate": 0.01, **opt}), total_steps, ema=ema)


def digest(dmp: torch.nn.Module) -> str:
    """Of the bits of all weights that this rank holds, frozen ones included."""
    found = hashlib.sha256()
    for name, value in sorted(dmp.state_dict().items()):
        shards = value.local_shards() if hasattr(value, "local_shards") else None
        for tensor in [value] if shards is None else [s.tensor for s in shards]:
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def frozen_bits(dmp: torch.nn.Module) -> list[torch.Tensor]:
    module = dmp.module
    return [
        stored.clone()
        for collection, name in ((module.user_frozen, "user"), (module.item_frozen, "item"))
        for _, stored in collection.shards(name)
    ]
