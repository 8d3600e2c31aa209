"""Memory of a rank of `recpress train`, part by part, each by a formula: what `recpress plan` prints.

Counted is memory that the kernel cannot take back: on a CPU rank anonymous memory. Libraries and factors that are
mapped from files are page cache, and not counted. The peak is the largest of four moments, in which different parts
live: `setup` (pairs of the log are collected), `load` (tables are filled), `train` (a step is under way), `checkpoint`
(so from the first checkpoint on: its copy of the state stays for the next one).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from recpress.data.batch import ITEM, USER
from recpress.data.memory import KEPT
from recpress.modules.config import TwoTowerConfig
from recpress.modules.frozen import FrozenEmbeddingBagCollection, row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.losses import make_loss
from recpress.modules.rows import BLOCK_BYTES
from recpress.modules.towers import TowerInput
from recpress.modules.two_tower import SideSpec, make_side
from recpress.trainer.config import NetworkConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec import EmbeddingBagCollection
from torchrec.distributed.types import ShardingPlan

MIB = 1 << 20
PROCESS = 262 * MIB
"""Anonymous memory of a process after `import recpress.trainer.train.stage`; torch 2.13 + torchrec 1.8, CPU."""
METRICS = 31 * MIB
"""What `torchmetrics` adds, which is imported when the tables are loaded."""
ALLOCATOR = 64 * MIB
"""What glibc may keep of freed memory: twice the largest block that it takes from the heap (mallopt(3))."""
UPLOAD = 224 * MIB
"""What `data.storage.upload_file` holds: 211 and 221 MiB of files of 256 and 512 MiB (measured, pyarrow 26)."""
PIPELINE = 3
"""Batches that TrainPipelineSparseDist holds: in the step, in the exchange of ids, on the way to the device."""
Place = Literal["device", "host"]
Phase = Literal["always", "run", "setup", "load", "train", "checkpoint"]
"""When a part is there: at one of the four moments (`train`: at `checkpoint` too), at all of them, or (`run`) from the
tables' making on."""


@dataclass(frozen=True)
class Line:
    """One part of a rank's memory."""

    name: str
    bytes: int
    formula: str
    place: Place
    phase: Phase = "run"


@dataclass(frozen=True, kw_only=True)
class MapShape:
    """The sizes of an IdMap, which is all that a plan needs of it."""

    num_ids: int
    num_rows: int
    ways: int = 1
    weight_bytes: int = 0
    """Of one weight; 0: the map has none."""

    @property
    def weights(self) -> bool | None:
        """As in IdMap: None where there are none."""
        return True if self.weight_bytes else None

    @classmethod
    def of(cls, id_map: IdMap) -> MapShape:
        width = 0 if id_map.weights is None else id_map.weights.element_size()
        return cls(num_ids=id_map.num_ids, num_rows=id_map.num_rows, ways=id_map.ways, weight_bytes=width)

    @property
    def nbytes(self) -> int:
        """As LearnedHash holds it: int32 rows, and the weights."""
        return self.num_ids * self.ways * (4 + self.weight_bytes)


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of users, or of items."""

    ids: int
    map: MapShape | None = None
    categorical: dict[str, int] = field(default_factory=dict)
    """Further categorical features of the side table: name -> number of values."""
    floats: int = 0
    feature_bytes: int = 0
    """Of the side table, which each rank holds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, with or without its log."""

    network: NetworkConfig
    dim: int | None
    """Of the factors; None for `random`."""
    user: Side
    item: Side
    rows: int
    """Interactions of the log, before sampling; 0: unknown."""
    sampled: int
    """Of the sample; 0: unknown."""
    group_rows: int
    """Rows of the largest row group."""
    keep_best: bool = False
    """A copy of the best weights is held (evaluation.every, evaluation.every_steps)."""
    uploads: bool = False
    """Checkpoints lie on an object store."""
    metrics: bool = False
    """TorchRec's metrics are computed."""
    row_vectors: bool = True
    """The vectors of the maps' rows are stored beside them, and need not be worked out on each rank."""

    @property
    def strides(self) -> tuple[int, int]:
        """Users and items of a batch of one rank."""
        batch, negatives = self.network.stream.batch_size, self.network.negatives
        if negatives.kind == "in-batch":
            return batch, batch
        return batch, batch + negatives.count * (1 if negatives.shared else batch)

    def with_tables(self, config: TwoTowerConfig, dim: int | None, share: float | None, ways: int) -> Job:
        """The same run with other tables; `share`: behind maps to so many of the ids, None: without maps."""

        def mapped(side: Side) -> Side:
            if share is None:
                return replace(side, map=None)
            rows = max(1, round(side.ids * share))
            return replace(
                side,
                map=MapShape(num_ids=side.ids, num_rows=rows, ways=ways, weight_bytes=2 if ways > 1 else 0),
            )

        network = replace(self.network, model=config)
        return replace(self, network=network, dim=dim, user=mapped(self.user), item=mapped(self.item))


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
        row = row_bytes(self.storage, self.width)  # type: ignore[arg-type]
        return self.rows * (-(-row // 16) * 16 if cuda and self.storage == "int4" else row)


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


def rank_lines(
    job: Job, model: MetaTowers, shards: list[Shard], *, world: int, cuda: bool, context: int, activations: int
) -> list[Line]:
    """All parts of the memory of one rank that holds `shards`.

    Args:
        context: bytes that CUDA and its libraries take of the device.
        activations: `activation_bytes`, which does not depend on the ranks.
    """
    device: Place = "device" if cuda else "host"
    negatives = job.network.negatives
    batch, items = job.strides
    strides = {"user": batch, "item": items}
    trained = [s for s in shards if s.storage is None]
    frozen = [s for s in shards if s.storage is not None]
    trained_bytes, state = sum(s.nbytes(cuda) for s in trained), sum(4 * s.rows for s in trained)
    frozen_bytes = sum(s.nbytes(cuda) for s in frozen)
    lines = [Line("process", PROCESS, "torch, torchrec and recpress imported (measured)", "host", "always")]
    if job.metrics:
        lines.append(Line("metrics", METRICS, "torchmetrics imported (measured)", "host", "train"))
    if cuda:
        lines.append(Line("CUDA context", context, "--cluster.context-gib (assumed)", "device", "always"))
    if trained:
        lines.append(Line("trainable tables", trained_bytes, "rows x dim x 4 B", device))
        lines.append(Line("optimizer state", state, "row-wise Adagrad: 4 B a row", device))
    if frozen:
        lines.append(Line("frozen tables", frozen_bytes, "rows x bytes of a row, scale included", device))
    sides = (job.user, job.item)
    maps = [side.map for side in sides if side.map is not None]
    if maps:
        size = sum(m.nbytes for m in maps)
        lines.append(Line("maps", size, "every rank: ids x ways x (4 B + weight)", device))
        if model.counted:
            codes = sum(m.num_ids for m in maps)
            lines.append(Line("log counts behind maps", codes, "every rank: ids x 1 B", device))
    features = sum(side.feature_bytes for side in sides)
    if features:
        lines.append(Line("side features", features, "every rank: ids x 8 B a category, 4 B a float", device))
    dense = sum(4 * p.numel() for p in model.dense())
    lines.append(Line("dense part", 4 * dense, "weights, gradients (DDP buckets), 2 Adam moments", device, "train"))
    if job.keep_best:
        copied = trained_bytes + dense
        lines.append(Line("best weights", copied, "a copy of what is trained", device, "train"))
    staged = trained_bytes + state + 3 * dense
    formula = "trainable tables, optimizer state, dense weights and 2 Adam moments"
    lines.append(Line("copy for checkpoints", staged, formula, "host", "checkpoint"))
    if job.uploads:
        formula = f"at most {UPLOAD // MIB} MiB (measured), whatever its size"
        lines.append(Line("upload of a checkpoint", min(staged, UPLOAD), formula, "host", "checkpoint"))
    lines += _negatives_lines(job, device)
    wide = sum(strides[s.side] * s.width for s in shards) * 4 * world
    whole = sum(strides[t.side] * t.width for t in tables_of(model)) * 4
    again = sum(strides[s.side] * s.width for s in trained) * 4 * world
    copies = 1 if world == 1 else 2
    lines += [
        Line("activations", activations, "towers, loss and gradients: peak of a step on meta tensors", device, "train"),
        Line(
            "looked-up vectors",
            copies * (wide + again) + whole,
            f"ranks x batch x widths of the shards x 4 B x {copies}, trained twice; + what this rank receives",
            device,
            "train",
        ),
    ]
    ids = 8 * (batch + items)
    one = 3 * ids + 4 * (batch + items) + 4 * batch + (batch * negatives.count if negatives.shared else 0)
    lines.append(
        Line("batches", PIPELINE * one, f"{PIPELINE} x (ids, lengths, offsets, labels, masks)", device, "train")
    )
    lines += _stream_lines(job, world)
    lines += [
        Line("freed, kept by malloc", ALLOCATOR, "glibc: 2 x 32 MiB", "host", "always"),
    ]
    return lines + _load_lines(job, model, shards, cuda)


def _stream_lines(job: Job, world: int) -> list[Line]:
    """`data.memory` without a log: rounds that are in memory, whole or in part, and row groups that are decoded."""
    network = job.network
    config, row = network.stream, 8 * 2 + (4 if network.use_label else 0)
    rate = job.sampled / job.rows if job.rows else 1.0
    ahead = rate * job.group_rows * config.lanes  # rows of all ranks that row groups bring beyond a round
    held = 3 * config.buffer_rows + 2 * ahead
    held = min(held, job.sampled or held) / world
    threads, group = config.chosen_threads, job.group_rows * row
    decode = threads * 4 * group + (2 * threads + 1) * rate * group
    return [
        Line("stream", round(held * row), "(3 buffer_rows + 2 lanes x row group) / ranks x B a row", "host", "train"),
        Line("decoding", round(decode), "(4 threads + (2 threads + 1) x rate) x row group x B a row", "host", "always"),
        Line("kept in threads' heaps", KEPT, "glibc: of what reading threads have freed (measured)", "host", "always"),
    ]


def _load_lines(job: Job, model: MetaTowers, shards: list[Shard], cuda: bool) -> list[Line]:
    """What host memory holds while tables are filled, and no longer."""
    lines = []
    maps = [side.map for side in (job.user, job.item) if side.map is not None]
    largest = max((4 * s.rows * s.width for s in shards if _is_loaded(job, s)), default=0)
    if largest:
        formula = "4 blocks of 32 MiB: file, copy, this block and the last"
        lines.append(Line("loading tables", 4 * min(BLOCK_BYTES, largest), formula, "host", "load"))
    if maps and job.dim is not None and not job.row_vectors:
        whole = {table.table: table for table in tables_of(model)}
        sides = [("user", job.user), ("item", job.item)]
        found = []
        for name, side in sides:
            if side.map is not None:
                rows = whole[name].rows * 2 if side.map.ways == 1 else side.ids * 6
                found.append(4 * rows * job.dim)
        formula = "every rank: rows x dim x 4 B x 2; of two rows an id: ids x dim x 4 B x 6"
        lines.append(Line("shared rows worked out", max(found), formula, "host", "load"))
    if cuda:
        on_the_way = sum(m.nbytes + m.num_ids * model.counted for m in maps)
        if on_the_way:
            lines.append(Line("maps, before they move", on_the_way, "as on the GPU", "host", "load"))
        if job.network.negatives.reject_positives and job.rows:
            size = 8 * job.rows + _filter_bits(job.rows) // 8
            lines.append(Line("positive pairs, before they move", size, "9 to 10 B a row of the log", "host", "load"))
    return lines


def _filter_bits(rows: int) -> int:
    """Of `data.pairs`: the power of two from 8 times the keys on."""
    return 1 << max(0, 8 * rows - 1).bit_length() if rows else 0


def _is_loaded(job: Job, shard: Shard) -> bool:
    return job.dim is not None and (shard.storage is not None or shard.table in ("user", "item"))


def _negatives_lines(job: Job, device: Place) -> list[Line]:
    negatives, lines = job.network.negatives, []
    batch, _ = job.strides
    tables = (negatives.kind != "uniform") + (negatives.kind != "uniform" or job.network.model.loss.in_batch)
    if tables:
        lines.append(Line("item counts", tables * 12 * job.item.ids, f"{tables} x 12 B an item", device))
    if not negatives.reject_positives:
        return lines
    filter_bits = _filter_bits(job.rows)
    bits = filter_bits // 8 if device == "host" else 0
    lines.append(
        Line("positive pairs", 8 * job.rows + bits, "every rank: 8 B a row of the log, on CPU + 1 to 2 B", device)
    )
    collect = 16 * job.rows + max(8 * job.rows, filter_bits + 24 * job.rows)
    lines.append(Line("collecting pairs", collect, "8 B x 5 a row + a byte a bit", "host", "setup"))
    if negatives.shared:
        mask = 4 * job.item.ids + 2 * batch * negatives.count
        lines.append(Line("marking positives", mask, "4 B an item + 2 x batch x negatives", device, "train"))
    return lines


def peaks(lines: list[Line], place: Place) -> dict[str, int]:
    """Bytes at each moment."""
    live: dict[str, tuple[Phase, ...]] = {
        "setup": ("always", "setup"),
        "load": ("always", "run", "load"),
        "train": ("always", "run", "train"),
        "checkpoint": ("always", "run", "train", "checkpoint"),
    }
    return {
        moment: sum(line.bytes for line in lines if line.place == place and line.phase in phases)
        for moment, phases in live.items()
    }


def peak(lines: list[Line], place: Place) -> int:
    """Bytes at the worst moment."""
    return max(peaks(lines, place).values())


class _Peak(TorchDispatchMode):
    """Follows the bytes of the tensors that live; on the device "meta" nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
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
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activation_bytes(job: Job, model: MetaTowers) -> int:
    """Most bytes of tensors in forward and backward of towers and loss, run on tensors without memory."""
    batch, items = job.strides
    training = job.network.model.tables.strategy != "init-freeze"
    negatives = job.network.negatives

    def given(tower: TowerInput, size: int) -> tuple[dict, dict, Any, Any]:
        results: dict[str, dict[str, torch.Tensor]] = {"frozen": {}, "tables": {}}
        for (where, key), width in [(tower.base, tower.dim), *tower.others]:
            wants = where == "tables" and training
            results[where][key] = torch.empty(size, width, device="meta", requires_grad=wants)
        count = torch.empty(size, 1, device="meta") if tower.count == "given" else None
        if tower.count not in (None, "given"):
            where, key = cast(tuple[Literal["frozen", "tables"], str], tower.count)
            results[where][key] = torch.empty(size, 4, device="meta")
        floats = torch.empty(size, tower.floats, device="meta") if tower.floats else None
        return results["frozen"], results["tables"], floats, count

    inputs = given(model.user_tower.given, batch), given(model.item_tower.given, items)
    label, log_q = torch.empty(batch, device="meta"), torch.empty(items, device="meta")
    ids = torch.empty(items, dtype=torch.int64, device="meta")
    mask = torch.empty(batch, negatives.count, dtype=torch.bool, device="meta") if negatives.shared else None
    with _Peak() as tracked:
        users, _ = cast(Any, model.user_tower)(*inputs[0])
        vectors, _ = cast(Any, model.item_tower)(*inputs[1])
        loss = model.loss(users, vectors, label, log_q, ids, mask)
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return tracked.most
