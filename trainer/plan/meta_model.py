"""The model of a run as shapes without memory: tables for TorchRec's planner, activations of a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec import EmbeddingBagCollection
from torchrec.distributed.types import ShardingPlan

from recpress.data.stream.batch import ITEM, USER
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import stored_row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.two_tower.losses import make_loss
from recpress.modules.two_tower.model import SideSpec, make_side
from recpress.modules.two_tower.towers import TowerInput
from recpress.trainer.model.two_tower import is_counted
from recpress.trainer.plan.job import Job


@dataclass(frozen=True)
class Shard:
    """The part of a table on one rank."""

    table: str
    side: Literal["user", "item", ""]
    """Empty: a model of labels."""
    rows: int
    width: int
    storage: str | None
    """None: trainable."""
    lookups: int = 1
    """Features that look it up."""

    def nbytes(self, cuda: bool) -> int:
        """As stored; int4 rows on CUDA are padded to 16 bytes."""
        if self.storage is None:
            return self.rows * self.width * 4
        return self.rows * stored_row_bytes(self.storage, self.width, "cuda" if cuda else "cpu")  # type: ignore[arg-type]


class TableModel(Protocol):
    """Tables without memory, for TorchRec's planner: MetaTowers or MetaLabelled, which are modules."""

    def table_shards(self) -> Iterator[Shard]:
        """Each table as a single shard."""


class MetaTowers(nn.Module):
    """The tables and towers of a TwoTower on the device "meta": shapes without memory, for the planner."""

    def __init__(self, job: Job) -> None:
        """
        Raises:
            ValueError: see TwoTower.
        """
        super().__init__()
        config, meta = job.network.model, torch.device("meta")
        user, item = (
            SideSpec(
                key=key,
                rows=side.ids,
                dim=job.dim,
                counted=is_counted(config, "item" if key == ITEM else "user", job.dim),
                categorical=side.categorical,
                floats=side.floats,
                map=cast(IdMap, side.map),
            )
            for key, side in ((USER, job.user), (ITEM, job.item))
        )
        if config.tables.history != "none":
            user = replace(user, history=job.item.ids)
        self.counted = item.counted
        with meta:
            self.user_frozen, self.user_tables, self.user_tower = make_side("user", config, user, meta)
            self.item_frozen, self.item_tables, self.item_tower = make_side("item", config, item, meta)
            self.loss = make_loss(config.loss, job.item.ids)

    def dense(self) -> list[nn.Parameter]:
        """Trained parameters that are replicated on every rank."""
        return [p for part in (self.user_tower, self.item_tower, self.loss) for p in part.parameters()]

    def table_shards(self) -> Iterator[Shard]:
        """Each table as a single shard."""
        sides: tuple[Literal["user", "item"], ...] = ("user", "item")
        for side in sides:
            frozen, trained = getattr(self, f"{side}_frozen"), getattr(self, f"{side}_tables")
            if isinstance(frozen, FrozenEmbeddingBagCollection):
                for t in frozen.tables():
                    yield Shard(t.name, side, t.rows, t.dim, t.storage)
            if isinstance(trained, EmbeddingBagCollection):
                for c in trained.embedding_bag_configs():
                    yield Shard(c.name, side, c.num_embeddings, c.embedding_dim, None)


def shards_by_rank(model: TableModel, layout: ShardingPlan, world: int) -> list[list[Shard]]:
    """The shards of each rank under a plan."""
    tables = {table.table: table for table in model.table_shards()}
    ranks: list[list[Shard]] = [[] for _ in range(world)]
    for module in layout.plan.values():
        for name, how in cast(Any, module).items():
            for shard in how.sharding_spec.shards:
                rows, width = shard.shard_sizes
                ranks[shard.placement.rank()].append(replace(tables[name], rows=rows, width=width))
    return ranks


def even_shards(model: TableModel, world: int) -> list[Shard]:
    """The shards of a rank if each table is cut into equal blocks of rows."""
    return [replace(table, rows=-(-table.rows // world)) for table in model.table_shards()]


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors; on the device "meta" nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activation_bytes(job: Job, model: MetaTowers) -> int:
    """Peak bytes of tensors in forward and backward of towers and loss, run on tensors without memory."""
    batch, items = job.strides
    training = job.network.model.tables.strategy != "frozen"
    negatives = job.network.negatives

    def inputs(tower: TowerInput, size: int) -> tuple[dict, dict, Any, Any]:
        results: dict[str, dict[str, torch.Tensor]] = {"frozen": {}, "tables": {}}
        for (where, key), width in [(tower.base, tower.dim), *tower.others]:
            trained = where == "tables" and training
            results[where][key] = torch.empty(size, width, device="meta", requires_grad=trained)
        count = torch.empty(size, 1, device="meta") if tower.count == "given" else None
        if tower.count not in (None, "given"):
            where, key = cast(tuple[Literal["frozen", "tables"], str], tower.count)
            results[where][key] = torch.empty(size, 4, device="meta")
        floats = torch.empty(size, tower.floats, device="meta") if tower.floats else None
        return results["frozen"], results["tables"], floats, count

    user_inputs, item_inputs = inputs(model.user_tower.given, batch), inputs(model.item_tower.given, items)
    label, log_q = torch.empty(batch, device="meta"), torch.empty(items, device="meta")
    ids = torch.empty(items, dtype=torch.int64, device="meta")
    mask = torch.empty(batch, negatives.count, dtype=torch.bool, device="meta") if negatives.shared else None
    with PeakBytes() as tracked:
        users, _ = cast(Any, model.user_tower)(*user_inputs)
        vectors, _ = cast(Any, model.item_tower)(*item_inputs)
        loss = model.loss(users, vectors, label, log_q, ids, mask)
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return tracked.peak
