"""The two-tower network: tables, towers, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from recpress.modules.als.exchange import Exchange
from recpress.modules.config import HISTORY, TwoTowerConfig
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import QUANTIZED, FrozenTable, Storage, row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import IdVectors, shared_rows
from recpress.modules.row_source import RowSource, blocks, check_source, load_rows, round_up
from recpress.modules.two_tower.losses import make_loss
from recpress.modules.two_tower.towers import ResidualTower, TableOutput, Tower, TowerInput, make_tower


@dataclass(frozen=True, kw_only=True)
class SideSpec:
    """The features and table sizes of users, or of items."""

    key: str
    """Feature key of the id in the KeyedJaggedTensor."""
    rows: int
    """Number of ids."""
    dim: int | None = None
    """Dimension of the factors; None if there are none (`random`)."""
    counted: bool = False
    """Whether the tower gets the id's log count (see `load_counts`). It comes from a separate frozen table or, if the
    ids have a map, which is replicated, from one byte per id (`CountCodes`)."""
    categorical: Mapping[str, int] = field(default_factory=dict)
    """Additional categorical features: key -> number of values."""
    floats: int = 0
    """Number of additional float features."""
    history: int = 0
    """Of users: number of items, the rows of the table of histories (key `HISTORY`); 0: there are none."""
    map: IdMap | None = None
    """If given, ids share the rows of their tables by this map. Counts and features remain per id."""


class TwoTower(nn.Module):
    """score(u, i) = user tower(u) . item tower(i).

    The strategy `config.tables.strategy` decides on the id tables: `random` and `warm-start` train them, `frozen` puts
    them into a separate collection without training, `frozen+residual` adds a small trainable table. Call
    `load_factors` after sharding. With tables_device="meta", the module can only be sharded.

    With an id map, the id tables are looked up by the key "<key>_rows", which the forward computes from the ids. A
    train pipeline needs `pipeline_postproc=True` for it.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        user: SideSpec,
        item: SideSpec,
        tables_device: torch.device | str = "cpu",
    ) -> None:
        """
        Raises:
            ValueError: the strategy needs factors, and there are none; vectors of users and items have different
                dimensions; a map has another number of ids.
        """
        super().__init__()
        self.config, self.user, self.item = config, user, item
        device = torch.device(tables_device)
        self.user_rows = None if user.map is None else MappedRows(user.key, user.map)
        self.item_rows = None if item.map is None else MappedRows(item.key, item.map)
        self.user_frozen, self.user_tables, self.user_tower = make_side("user", config, user, device)
        self.item_frozen, self.item_tables, self.item_tower = make_side("item", config, item, device)
        self.user_counts = CountCodes(user) if user.counted and user.map is not None else None
        self.item_counts = CountCodes(item) if item.counted and item.map is not None else None
        self.table_bytes = {
            **_table_bytes(self.user_frozen, self.user_tables),
            **_table_bytes(self.item_frozen, self.item_tables),
        }
        for name, codes in (("user_count", self.user_counts), ("item_count", self.item_counts)):
            if codes is not None:
                self.table_bytes[name] = codes.codes.nbytes
        """Bytes of each stored table, summed over the ranks."""
        if self.user_tower.out_dim != self.item_tower.out_dim:
            raise ValueError(
                f"user vectors have dimension {self.user_tower.out_dim}, expected that of item vectors, "
                f"{self.item_tower.out_dim}"
            )
        self.loss = make_loss(config.loss, item.rows)
        self.skip_nonfinite = False
        """Whether a batch with a non-finite loss gives zero loss and zero gradients to towers and tables."""
        self.item_ids = _Ids(item.key)

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, the same detached), as TrainPipelineSparseDist expects.

        Args:
            batch: `user_features` KeyedJaggedTensor of stride B, `item_features` (layout in `losses`),
                `label` (B,), `log_q` (items,), `excluded` (B, N) or None, and, if there are float features,
                `user_floats` (B, F) and `item_floats` (items, F).
        """
        users, user_penalty = self._users(batch.user_features, batch.user_floats if self.user.floats else None)
        items, item_penalty = self._items(batch.item_features, batch.item_floats if self.item.floats else None)
        finite = users.new_ones((), dtype=torch.bool)
        if self.skip_nonfinite:
            users, items = _guard(users, finite), _guard(items, finite)
        ids = self.item_ids(batch.item_features)
        with _float32(users):
            loss = self.loss(users.float(), items.float(), batch.label, batch.log_q, ids, batch.excluded)
        if self.config.towers.kind == "residual" and self.config.towers.penalty:
            loss = loss + self.config.towers.penalty * (user_penalty + item_penalty)
        if not self.skip_nonfinite:
            return loss, loss.detach()
        finite.copy_(torch.isfinite(loss.detach()))
        return torch.where(finite, loss, torch.zeros_like(loss)), loss.detach()

    @torch.no_grad()
    def user_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective if the tables are sharded: each rank must call it equally often."""
        return self._users(features, floats)[0]

    @torch.no_grad()
    def item_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective if the tables are sharded: each rank must call it equally often."""
        return self._items(features, floats)[0]

    def _users(self, features: KeyedJaggedTensor, floats: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(vectors (B, d), penalty of the tower)."""
        count = None if self.user_counts is None else self.user_counts(features)
        features = features if self.user_rows is None else self.user_rows(features)
        frozen = None if self.user_frozen is None else self.user_frozen(features)
        tables = None if self.user_tables is None else self.user_tables(features)
        return self.user_tower(frozen, tables, floats, count)

    def _items(self, features: KeyedJaggedTensor, floats: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(vectors (B, d), penalty of the tower)."""
        count = None if self.item_counts is None else self.item_counts(features)
        features = features if self.item_rows is None else self.item_rows(features)
        frozen = None if self.item_frozen is None else self.item_frozen(features)
        tables = None if self.item_tables is None else self.item_tables(features)
        return self.item_tower(frozen, tables, floats, count)

    def load_factors(
        self,
        user: RowSource,
        item: RowSource,
        *,
        counts: Sequence[RowSource | None] = (None, None),
        rows: Sequence[RowSource | None] = (None, None),
    ) -> None:
        """Load the id tables, each rank its own shards. Call it after sharding, and again to replace the factors.

        With a map, it is collective if there is a default process group: each rank reads its part of the ids.

        Args:
            user, item: (ids, dim) each. With a map, each rank holds all shared rows; see `shared_rows.shared_rows` for
                the memory.
            counts: (ids, 1) each, of users and of items: the weight of an id among those that share a row.
            rows: (map.num_rows, dim) each, the shared rows of users and of items, if already known.

        Raises:
            ValueError: shapes or values do not fit.
        """
        assert self.config.tables.strategy != "random", "random tables take no factors"
        sources: list[RowSource] = []
        exchange = Exchange.of_default_group()
        # collective, so for both sides before anything that can fail on a single rank
        for side, spec, source, of_ids, given in zip(
            ("user", "item"), (self.user, self.item), (user, item), counts, rows, strict=True
        ):
            if spec.map is not None:
                source = shared_rows(spec.map, source, of_ids, side, exchange) if given is None else given
            sources.append(source)
        history = self.config.tables.history if self.user.history else "none"
        for side, spec, source, frozen, tables, tower in (
            ("user", self.user, sources[0], self.user_frozen, self.user_tables, self.user_tower),
            ("item", self.item, sources[1], self.item_frozen, self.item_tables, self.item_tower),
        ):
            loaded = {side: source} if side == "item" or history != "only" else {}
            if side == "user" and history != "none":
                loaded["user_history"] = item
            for name, rows_of in loaded.items():
                if self.config.tables.strategy == "warm-start":
                    assert tables is not None
                    load_rows(tables.state_dict()[f"embedding_bags.{name}.weight"], name, rows_of)
                else:
                    assert frozen is not None
                    frozen.load(name, rows_of)
            if side in loaded:
                tower.fit_scale(source if spec.map is None else IdVectors(spec.map, source))

    def load_counts(self, user: RowSource, item: RowSource) -> None:
        """Load standardized log counts (`row_source.LogCounts`), (ids, 1) each. Call it after sharding."""
        for spec, name, source, frozen, codes in (
            (self.user, "user_count", user, self.user_frozen, self.user_counts),
            (self.item, "item_count", item, self.item_frozen, self.item_counts),
        ):
            if codes is not None:
                codes.load(name, source)
            elif spec.counted:
                assert frozen is not None
                frozen.load(name, source)


def _float32(vectors: torch.Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off. A train pipeline that traces the model has none."""
    if isinstance(vectors, torch.fx.Proxy):
        return nullcontext()
    device = vectors.device.type
    known = torch.amp.is_autocast_available(device)  # not on the device "meta"
    return torch.autocast(device, enabled=False) if known and torch.is_autocast_enabled(device) else nullcontext()


@torch.fx.wrap  # the train pipeline cannot trace this
def _guard(vectors: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """The vectors. Their gradient is zero if `finite`, which is set later, is false."""
    if vectors.requires_grad:
        vectors.register_hook(lambda grad: torch.where(finite, grad, torch.zeros_like(grad)))
    return vectors


class _Ids(nn.Module):
    """The ids of one feature of a KeyedJaggedTensor, with one id per bag."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return features[self.key].values()


class MappedRows(nn.Module):
    """Adds a feature "<key>_rows" with the rows of the ids of one feature.

    The other features do not change. They get weights of 1 if the map has weights.
    """

    def __init__(self, key: str, id_map: IdMap) -> None:
        super().__init__()
        self.key, self.rows_key = key, rows_key(key)
        self.hash = LearnedHash({key: id_map})

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ids = features[self.key]
        stride = features.stride()
        one = KeyedJaggedTensor(
            [self.key],
            ids.values(),
            weights=ids.weights_or_none(),
            lengths=ids.lengths(),
            stride=stride,
            length_per_key=[ids.values().numel()],
        )
        rows = self.hash(one)
        weights = features.weights_or_none()
        if rows.weights_or_none() is not None:
            before = rows.weights().new_ones(features.values().numel()) if weights is None else weights
            weights = torch.cat([before, rows.weights()])
        return KeyedJaggedTensor(
            [*features.keys(), self.rows_key],
            torch.cat([features.values(), rows.values()]),
            weights=weights,
            lengths=torch.cat([features.lengths(), rows.lengths().to(features.lengths().dtype)]),
            stride=stride,
            length_per_key=[*features.length_per_key(), *rows.length_per_key()],
        )


class CountCodes(nn.Module):
    """One number per id in one byte: 256 even steps from the smallest to the largest. Replicated on each rank."""

    def __init__(self, spec: SideSpec) -> None:
        super().__init__()
        self.key = spec.key
        self.codes: torch.Tensor
        self.span: torch.Tensor  # smallest value, and the step
        self.register_buffer("codes", torch.zeros(spec.rows, dtype=torch.uint8))
        self.register_buffer("span", torch.zeros(2))

    @torch.no_grad()
    def load(self, table: str, source: RowSource) -> None:
        """Load from (ids, 1). Raises ValueError if shape or values do not fit."""
        check_source(source, table, len(self.codes), 1)
        whole = (0, len(self.codes))
        low, high = torch.inf, -torch.inf
        for _, block in blocks(source, table, whole, (0, 1)):
            low, high = min(low, float(block.min())), max(high, float(block.max()))
        step = max((high - low) / 255, 1e-12)
        for first, block in blocks(source, table, whole, (0, 1)):
            codes = ((block[:, 0] - low) / step).round().clamp(0, 255)
            self.codes[first : first + len(block)] = codes.to(self.codes)
        self.span.copy_(torch.tensor([low, step]))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """(B, 1) float32 for the ids of a batch, one per bag. An id beyond the table gets the smallest number."""
        ids = features[self.key].values()
        codes = self.codes[ids.clamp(max=len(self.codes) - 1)].masked_fill(ids >= len(self.codes), 0)
        return (self.span[0] + self.span[1] * codes.float()).unsqueeze(1)


def rows_key(key: str) -> str:
    """The key of the rows of feature `key`."""
    return f"{key}_rows"


def make_side(
    name: Literal["user", "item"], config: TwoTowerConfig, spec: SideSpec, device: torch.device
) -> tuple[FrozenEmbeddingBagCollection | None, EmbeddingBagCollection | None, Tower | ResidualTower]:
    """The frozen tables, the trainable tables and the tower of users or items. Uses only the sizes of a map."""
    strategy = config.tables.strategy
    if spec.history and HISTORY in spec.categorical:
        raise ValueError(f"a feature of the {name}s is named {HISTORY!r}, the key of their items; rename it")
    if spec.history and config.tables.history == "only" and strategy == "frozen+residual":
        raise ValueError("strategy 'frozen+residual' adds to rows of users, which history 'only' has none of")
    if strategy != "random" and spec.dim is None:
        raise ValueError(f"strategy {strategy!r} starts from factors; there are none for {name}s")
    key, rows, weighted = spec.key, spec.rows, False
    if spec.map is not None:
        key, rows, weighted = rows_key(spec.key), spec.map.num_rows, spec.map.weights is not None
        if spec.map.num_ids != spec.rows:
            raise ValueError(f"table {name!r}: its map has {spec.map.num_ids} ids, expected {spec.rows}")
        if key in spec.categorical:
            raise ValueError(f"a feature of the {name}s is named {key!r}, the key of their rows; rename it")
    frozen: list[FrozenTable] = []
    trained: list[EmbeddingBagConfig] = []
    others: list[tuple[TableOutput, int]] = []
    base: TableOutput
    is_frozen = strategy in ("frozen", "frozen+residual")
    dim = round_up(config.tables.dim if strategy == "random" else spec.dim or 0)
    history: TableOutput = ("frozen" if is_frozen else "tables", HISTORY)
    tables: dict[str, tuple[int, str]] = {}
    if not spec.history or config.tables.history != "only":
        tables[name] = (rows, key)
    if spec.history:
        tables[f"{name}_history"] = (spec.history, HISTORY)
    for of_ids, (size, feature) in tables.items():
        if is_frozen:
            storage_of = config.tables.storage
            frozen.append(FrozenTable(name=of_ids, rows=size, dim=dim, features=(feature,), storage=storage_of))
        else:
            trained.append(_table(of_ids, size, dim, feature))
    if name not in tables:
        base = history
    elif is_frozen:
        base = ("frozen", f"{key}@{name}" if spec.counted and spec.map is None else key)
    else:
        base = ("tables", key)
    if spec.history and base != history:
        others.append((history, dim))
    count: TableOutput | Literal["given"] | None = None
    if spec.counted and spec.map is not None:
        count = "given"
    elif spec.counted:
        table = f"{name}_count"
        # One number and zeros in 4-bit codes have the precision of float16, in 6 bytes instead of 16.
        storage: Storage = "int4" if config.tables.storage in QUANTIZED else "fp32"
        frozen.append(FrozenTable(name=table, rows=spec.rows, dim=round_up(1), features=(spec.key,), storage=storage))
        count = ("frozen", f"{spec.key}@{table}" if len(frozen) > 1 else spec.key)
    if strategy == "frozen+residual":
        width = round_up(config.tables.residual_dim)
        trained.append(_table(f"{name}_plus", rows, width, key))
        others.append((("tables", key), width))
    for feature, values in spec.categorical.items():
        width = round_up(config.towers.feature_dim)
        trained.append(_table(f"{name}_{feature}", values, width, feature))
        others.append((("tables", feature), width))
    scaled = (history,) if spec.history else ()
    given = TowerInput(base=base, dim=dim, count=count, others=others, floats=spec.floats, scaled=scaled)
    tower = make_tower(config.towers, given, name)
    return (
        FrozenEmbeddingBagCollection(frozen, device=device, weighted=weighted) if frozen else None,
        EmbeddingBagCollection(tables=trained, is_weighted=weighted, device=device) if trained else None,
        tower,
    )


def _table_bytes(frozen: FrozenEmbeddingBagCollection | None, trained: EmbeddingBagCollection | None) -> dict[str, int]:
    found = {} if frozen is None else {t.name: t.rows * row_bytes(t.storage, t.dim) for t in frozen.tables()}
    configs = [] if trained is None else trained.embedding_bag_configs()
    return found | {c.name: 4 * c.num_embeddings * c.embedding_dim for c in configs}


def _table(name: str, rows: int, dim: int, key: str) -> EmbeddingBagConfig:
    bound = dim**-0.5  # TorchRec's default, 1 / sqrt(rows), leaves large tables at zero
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=[key],
        weight_init_min=-bound,
        weight_init_max=bound,
    )
