"""The tables of a run as shapes without memory, for TorchRec's planner, and what each rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.types import ShardingPlan

from recpress.data.stream.batch import ITEM, USER
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import stored_row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.two_tower.losses import make_loss
from recpress.modules.two_tower.model import SideSpec, make_side
from recpress.trainer.plan.job import Job


class MetaTowers(nn.Module):
    """The tables and towers of a TwoTower on the device "meta": shapes without memory, for the planner."""

    def __init__(self, job: Job) -> None:
        """
        Raises:
            ValueError: see TwoTower.
        """
        super().__init__()
        config, meta = job.network.model, torch.device("meta")
        counted = job.dim is not None and config.towers.kind == "residual"
        sides = []
        for key, side in ((USER, job.user), (ITEM, job.item)):
            sides.append(
                SideSpec(
                    key=key,
                    rows=side.ids,
                    dim=job.dim,
                    counted=counted,
                    categorical=side.categorical,
                    floats=side.floats,
                    map=cast(IdMap, side.map),
                )
            )
        self.counted = counted
        with meta:
            self.user_frozen, self.user_tables, self.user_tower = make_side("user", config, sides[0], meta)
            self.item_frozen, self.item_tables, self.item_tower = make_side("item", config, sides[1], meta)
            self.loss = make_loss(config.loss, job.item.ids)

    def dense(self) -> list[nn.Parameter]:
        """What every rank holds whole, and trains."""
        return [p for part in (self.user_tower, self.item_tower, self.loss) for p in part.parameters()]


@dataclass(frozen=True)
class Shard:
    """A part of a table on one rank."""

    table: str
    side: Literal["user", "item"]
    rows: int
    width: int
    storage: str | None
    """None: trainable."""

    def nbytes(self, cuda: bool) -> int:
        """As it is stored; int4 rows on CUDA are padded to 16 bytes."""
        if self.storage is None:
            return self.rows * self.width * 4
        return self.rows * stored_row_bytes(self.storage, self.width, "cuda" if cuda else "cpu")  # type: ignore[arg-type]


def tables_of(model: MetaTowers) -> Iterator[Shard]:
    """Each table as one whole shard."""
    for side in ("user", "item"):
        frozen, trained = getattr(model, f"{side}_frozen"), getattr(model, f"{side}_tables")
        if isinstance(frozen, FrozenEmbeddingBagCollection):
            for t in frozen.tables():
                yield Shard(t.name, side, t.rows, t.dim, t.storage)
        if isinstance(trained, EmbeddingBagCollection):
            for c in trained.embedding_bag_configs():
                yield Shard(c.name, side, c.num_embeddings, c.embedding_dim, None)


def shards_by_rank(model: MetaTowers, layout: ShardingPlan, world: int) -> list[list[Shard]]:
    """What each rank holds under a plan."""
    tables = {table.table: table for table in tables_of(model)}
    ranks: list[list[Shard]] = [[] for _ in range(world)]
    for module in layout.plan.values():
        for name, how in cast(Any, module).items():
            for shard in how.sharding_spec.shards:
                rows, width = shard.shard_sizes
                ranks[shard.placement.rank()].append(replace(tables[name], rows=rows, width=width))
    return ranks


def even_shards(model: MetaTowers, world: int) -> list[Shard]:
    """What a rank holds where each table is cut into equal blocks of rows."""
    return [replace(table, rows=-(-table.rows // world)) for table in tables_of(model)]
