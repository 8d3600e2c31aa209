"""Compress the tables of a model that exists: rows that ids share, frozen rows, or both.

model, report = compress(model, {"t_cat_0": id_map}, frozen={"t_item": factors})
print(report)
model = DistributedModelParallel(model, sharders=...)
report.load(model)      # sharding discards the rows of every table, TorchRec's own way
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable, Storage, row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.learned_hash import LearnedHash, Unknown
from recpress.modules.rows import RowSource, blocks, check_source, local_shards, round_up
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What became of one table; bytes are those of its rows, without optimizer state."""

    table: str
    kind: str
    """`shared`, `frozen` or `frozen, shared`."""
    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int
    map_bytes: int
    """Of the map as each rank holds it; 0 where another table of this report has the same map."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressReport:
    """What `compress` did; `str(report)` is a table. Holds the new rows until it is dropped."""

    tables: list[TableReport]
    rows: dict[str, RowSource] = field(repr=False)
    """Every table of the collections that were replaced -> its rows, as they are now."""

    def load(self, model: nn.Module) -> None:
        """Fill the tables of `model`, which was sharded after `compress`: each rank its own shards.

        DistributedModelParallel makes new rows for every table; without this call the frozen ones have none.

        Raises:
            ValueError: the model has none of the compressed collections, or a table has no rows to load (its weights
                were on the device "meta" when the model was compressed).
        """
        found = [
            m
            for m in model.modules()
            if isinstance(m, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        ]
        if not found:
            raise ValueError("compress: the model to load has no compressed collection")
        for module in found:
            for table in module.tables():
                if table not in self.rows:
                    raise ValueError(f"table {table!r}: it had no rows to load when the model was compressed")
                module.load(table, self.rows[table])

    def __str__(self) -> str:
        head = ("table", "what", "rows", "", "bytes", "", "map bytes")
        body = [
            (t.table, t.kind, f"{t.rows_before:,}", f"{t.rows_after:,}", f"{t.bytes_before:,}", f"{t.bytes_after:,}",
             f"{t.map_bytes:,}")
            for t in self.tables
        ]  # fmt: skip
        sums = [sum(getattr(t, name) for t in self.tables) for name in
                ("rows_before", "rows_after", "bytes_before", "bytes_after", "map_bytes")]  # fmt: skip
        lines = [head, *body, ("all", "", *(f"{s:,}" for s in sums))]
        widths = [max(len(line[c]) for line in lines) for c in range(len(head))]
        text = []
        for line in lines:
            names = [line[c].ljust(widths[c]) for c in (0, 1)]
            numbers = [line[c].rjust(widths[c]) for c in range(2, len(head))]
            text.append("  ".join(names + numbers).rstrip())
        kept = (sums[3] + sums[4]) / max(1, sums[2])
        return "\n".join([*text, f"bytes kept, maps included: {100 * kept:.1f} %"])


def compress(
    model: nn.Module,
    maps: Mapping[str, IdMap],
    frozen: Mapping[str, RowSource] | None = None,
    *,
    counts: Mapping[str, torch.Tensor] | None = None,
    warm_start: bool = True,
    storage: Storage = "fp32",
    unknown: Unknown = "hash",
    packed: bool = False,
) -> tuple[nn.Module, CompressReport]:
    """Replace tables of the EmbeddingBagCollections and EmbeddingCollections anywhere in `model`, in place.

    The forward's signature, the keys of its output, their order and dimensions stay; the other tables stay the same
    modules. Make optimizers after this call: the replaced weights are new parameters, the frozen ones none.

    Args:
        model: not sharded yet. Only where it is itself a collection is the returned module another one.
        maps: table name -> map of its ids onto fewer rows. All features of the table are mapped.
        frozen: table name -> its rows (ids, dim), frozen from now on. With a map too, the rows that are stored are
            those of `warm_rows`.
        counts: table name -> how often each id is accessed, (ids,); 1 each where it is missing.
        warm_start: rows of a shared, trainable table start as `warm_rows` of the old ones, else by the table's
            `init_fn`.
        storage: how frozen rows are stored.
        unknown, packed: as in `LearnedHash`.

    Raises:
        ValueError: a table that the model does not have; a map, counts or rows of another size; a table that is
            sharded already, has an optimizer in its backward pass, or is behind a module that treats its ids in
            another way; a feature of two tables that do not have the same map; what these collections cannot do:
            two rows an id in an EmbeddingCollection, frozen rows there, mean pooling with weighted maps or of frozen
            rows with per-sample weights. The model is unchanged then.
    """
    frozen, counts = frozen or {}, counts or {}
    named = {*maps, *frozen}
    if not named:
        raise ValueError("compress: neither maps nor frozen tables, expected at least one table")
    places = _places(model, named)
    for table in counts:
        if table not in maps:
            raise ValueError(f"table {table!r}: there are counts for it, but no map")
    if storage not in get_args(Storage):
        raise ValueError(f"compress: storage is {storage!r}, expected one of {', '.join(get_args(Storage))}")
    build = _Build(maps, frozen, counts, warm_start, storage, unknown, packed)
    made = {module: build.collection(module) for module in places}
    for module, paths in places.items():
        for path in paths:
            if not path:
                model = made[module]
                continue
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[module])
    return model, CompressReport(tables=build.report, rows=build.rows)


def warm_rows(
    source: RowSource,
    id_map: IdMap,
    counts: torch.Tensor | None = None,
    *,
    table: str = "",
    mean_pooled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows (num_rows, dim) float32, which of them some id has (num_rows,) bool) from one row for each id, read once.

    `shared_rows.shared_rows` solves two rows an id by least squares, in memory; here a table of any size is gone
    through in blocks, for training goes on from these rows.

    A row is the mean of what its ids ask of it, weighted by their counts (alike, where all are 0). An id with one row
    asks for its own vector x. With several rows of weights w_k it asks of each w_k x / sum(w^2), the smallest vectors
    whose weighted sum is x: of two unweighted rows, half of x each. With mean pooling, which divides by the number of
    rows, it asks for x.

    Raises:
        ValueError: counts that do not fit or are negative; values of `source` that are not finite.
    """
    num_ids = id_map.num_ids
    check_source(source, table, num_ids, source.shape[-1])
    if counts is None:
        counts = torch.ones(num_ids)
    if counts.shape != (num_ids,):
        raise ValueError(f"table {table!r}: counts have shape {tuple(counts.shape)}, expected ({num_ids},)")
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError(f"table {table!r}: counts hold a negative number, NaN or infinity")
    counts = counts.double().cpu()
    total = torch.zeros(id_map.num_rows, dtype=torch.float64)
    members = torch.zeros(id_map.num_rows, dtype=torch.float64)
    for way in range(id_map.ways):
        total.index_add_(0, id_map.rows[:, way].long(), counts)
        members.index_add_(0, id_map.rows[:, way].long(), torch.ones(num_ids, dtype=torch.float64))
    found = torch.zeros(id_map.num_rows, source.shape[1])
    for first, block in blocks(source, table, (0, num_ids), (0, source.shape[1])):
        part = slice(first, first + len(block))
        weights = torch.ones(len(block), id_map.ways) if id_map.weights is None else id_map.weights[part].float()
        share = weights / (weights**2).sum(1, keepdim=True).clamp_min(1e-12)
        if mean_pooled:
            share = torch.ones_like(share)
        for way in range(id_map.ways):
            rows = id_map.rows[part, way].long()
            of_row = torch.where(total[rows] > 0, counts[part] / total[rows], 1 / members[rows]).float()
            found.index_add_(0, rows, block * (of_row * share[:, way])[:, None])
    return found, members > 0


class CompressedEmbeddingBagCollection(nn.Module):
    """Takes the place of an EmbeddingBagCollection: maps ids, looks trainable and frozen tables up, joins them."""

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        hashes: LearnedHash | None,
        trainable: EmbeddingBagCollection | None,
        frozen: FrozenEmbeddingBagCollection | None,
        device: torch.device,
    ) -> None:
        """configs: of all tables in the old order, with the rows that they have now."""
        super().__init__()
        self.hashes, self.trainable, self.frozen = hashes, trainable, frozen
        self._configs, self._device = configs, device
        self._frozen_tables = set() if frozen is None else {t.name for t in frozen.tables()}
        self._is_weighted = (trainable is not None and trainable.is_weighted()) or (
            frozen is not None and frozen.weighted
        )
        kept = [c for c in configs if c.name not in self._frozen_tables]
        frozen_features = [f for c in configs if c.name in self._frozen_tables for f in c.feature_names]
        part_names = dict(zip([c.name for c in kept], get_embedding_names_by_table(kept), strict=True))
        # For each output: its key, its width, its key in the part that has it, the feature whose length divides it.
        self._outputs: list[tuple[str, int, bool, str, str]] = []
        for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
            is_frozen = config.name in self._frozen_tables
            for index, (name, feature) in enumerate(zip(names, config.feature_names, strict=True)):
                if is_frozen:
                    inner = f"{feature}@{config.name}" if frozen_features.count(feature) > 1 else feature
                else:
                    inner = part_names[config.name][index]
                divide = feature if is_frozen and config.pooling == PoolingType.MEAN else ""
                self._outputs.append((name, config.embedding_dim, is_frozen, inner, divide))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As the EmbeddingBagCollection whose place it takes."""
        if self.hashes is not None:
            features = self.hashes(features)
        if self.frozen is None:
            assert self.trainable is not None
            return self.trainable(features)
        frozen = self.frozen(features)
        trained = None if self.trainable is None else self.trainable(features)
        return _join(frozen, trained, features, self._outputs)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """All tables in the old order, with the rows that they have now."""
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return self._device

    def tables(self) -> list[str]:
        return [config.name for config in self._configs]

    def load(self, table: str, source: RowSource) -> None:
        """Fill a table, plain or sharded, from its new rows (num_rows, dim)."""
        if table in self._frozen_tables:
            assert self.frozen is not None
            self.frozen.load(table, source)
        else:
            assert self.trainable is not None
            _fill(self.trainable.state_dict()[f"embedding_bags.{table}.weight"], table, source)


class CompressedEmbeddingCollection(nn.Module):
    """Takes the place of an EmbeddingCollection: maps ids, then looks them up."""

    def __init__(self, hashes: LearnedHash, trainable: EmbeddingCollection, device: torch.device) -> None:
        super().__init__()
        self.hashes, self.trainable = hashes, trainable
        self._configs, self._device = trainable.embedding_configs(), device

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """As the EmbeddingCollection whose place it takes."""
        return self.trainable(self.hashes(features))

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return get_embedding_names_by_table(self._configs)

    def need_indices(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._device

    def tables(self) -> list[str]:
        return [config.name for config in self._configs]

    def load(self, table: str, source: RowSource) -> None:
        """Fill a table, plain or sharded, from its new rows (num_rows, dim)."""
        _fill(self.trainable.state_dict()[f"embeddings.{table}.weight"], table, source)


class _UnweightedHash(LearnedHash):
    """Before tables that took no per-sample weights, and take those of their maps now."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if features.weights_or_none() is not None:
            variable = features.variable_stride_per_key()
            features = KeyedJaggedTensor(
                keys=features.keys(),
                values=features.values(),
                lengths=features.lengths_or_none(),
                offsets=features.offsets_or_none(),
                stride=None if variable else features.stride(),
                stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
                length_per_key=features.length_per_key_or_none(),
                inverse_indices=features.inverse_indices_or_none(),
            )
        return super().forward(features)


@torch.fx.wrap
def _join(
    frozen: KeyedTensor,
    trained: KeyedTensor | None,
    features: KeyedJaggedTensor,
    outputs: list[tuple[str, int, bool, str, str]],
) -> KeyedTensor:
    """Columns of both parts in the order of `outputs`; a leaf of torch.fx, so that the pipeline can trace past it.

    Raises:
        ValueError: the keys of the batch have strides of their own, which frozen tables do not know.
    """
    if features.variable_stride_per_key():
        raise ValueError("compress: a batch with another stride for each key cannot look up in frozen tables")
    values = []
    for _, dim, is_frozen, name, divide in outputs:
        part = frozen if is_frozen else trained
        assert part is not None
        value = part[name]
        value = value if value.shape[1] == dim else value[:, :dim]  # a frozen table's dimension is padded
        if divide:
            value = value / features[divide].lengths().clamp_min(1)[:, None]
        values.append(value)
    return KeyedTensor([o[0] for o in outputs], [o[1] for o in outputs], torch.cat(values, 1))


def _fill(weight: Any, table: str, source: RowSource) -> None:
    check_source(source, table, weight.shape[0], weight.shape[1])
    for (rows, columns), local in local_shards(weight):
        for first, block in blocks(source, table, rows, columns):
            with torch.no_grad():
                local[first - rows[0] : first - rows[0] + len(block)].copy_(block)


def _places(model: nn.Module, named: set[str]) -> dict[nn.Module, list[str]]:
    """Collections that hold named tables -> all paths to them."""
    modules = list(model.named_modules(remove_duplicate=False))
    owner: dict[str, tuple[str, nn.Module]] = {}
    places: dict[nn.Module, list[str]] = {}
    for path, module in modules:
        where = path or "the model"
        if isinstance(module, ShardedModule):
            raise ValueError(f"{where}: {type(module).__name__} is sharded already; compress the model before that")
        tables = _tables(module)
        for table in tables:
            if table in named and owner.setdefault(table, (where, module))[1] is not module:
                raise ValueError(f"table {table!r}: it is in two collections, {owner[table][0]} and {where}")
        if named & tables.keys():
            places.setdefault(module, []).append(path)
            if path:
                parent = model.get_submodule(path.rpartition(".")[0])
                if type(parent).__module__.startswith("torchrec.modules."):
                    raise ValueError(
                        f"{where}: it is behind {type(parent).__name__}, which treats its ids in a way of its own; "
                        "compress takes plain collections"
                    )
    lacking = sorted(named - owner.keys())
    if lacking:
        there = sorted({table for _, module in modules for table in _tables(module)})
        raise ValueError(f"the model has no table {lacking[0]!r}; it has {', '.join(there) or 'none'}")
    return places


def _tables(module: Any) -> dict[str, Any]:
    if type(module) is EmbeddingBagCollection:
        return {config.name: config for config in module.embedding_bag_configs()}
    if type(module) is EmbeddingCollection:
        return {config.name: config for config in module.embedding_configs()}
    return {}


class _Build:
    """Makes the new collections and notes what it did; changes nothing of the old ones."""

    def __init__(
        self,
        maps: Mapping[str, IdMap],
        frozen: Mapping[str, RowSource],
        counts: Mapping[str, torch.Tensor],
        warm_start: bool,
        storage: Storage,
        unknown: Unknown,
        packed: bool,
    ) -> None:
        self.maps, self.frozen, self.counts = maps, frozen, counts
        self.warm_start, self.storage, self.unknown, self.packed = warm_start, storage, unknown, packed
        self.report: list[TableReport] = []
        self.rows: dict[str, RowSource] = {}
        self._seen: set[IdMap] = set()

    def collection(self, old: Any) -> Any:
        bags = isinstance(old, EmbeddingBagCollection)
        configs = old.embedding_bag_configs() if bags else old.embedding_configs()
        old_tables = old.embedding_bags if bags else old.embeddings
        for config in configs:
            self._check(config, old_tables[config.name].weight)
        mapped = self._features(configs)
        after = [
            replace(c, num_embeddings=self.maps[c.name].num_rows) if c.name in self.maps else replace(c)
            for c in configs
        ]
        kept = [c for c in after if c.name not in self.frozen]
        if bags:
            new = self._bags(old, configs, after, kept, mapped)
            tables = None if new.trainable is None else new.trainable.embedding_bags
        else:
            new = self._sequences(old, configs, kept, mapped)
            tables = new.trainable.embeddings
        if new.trainable is not None:  # made on "meta", so that tables that stay are never made twice
            new.trainable._device = old.device
        for before, config in zip(configs, after, strict=True):
            weight = old_tables[config.name].weight
            if config.name in self.frozen:
                self.rows[config.name] = self._frozen_rows(before)
                if old.device.type != "meta":
                    new.load(config.name, self.rows[config.name])
            else:
                assert tables is not None
                if config.name in self.maps:
                    self._start(before, config, tables[config.name], weight)
                else:
                    tables[config.name] = old_tables[config.name]
                if weight.device.type != "meta":
                    self.rows[config.name] = tables[config.name].weight.detach()
            if config.name in self.maps or config.name in self.frozen:
                self._note(before, config, weight)
        return new

    def _bags(self, old: Any, configs: Any, after: Any, kept: Any, mapped: dict[str, IdMap]) -> Any:
        weighted_maps = any(m.weights is not None for m in mapped.values())
        weighted = old.is_weighted() or weighted_maps
        for config in configs:
            if config.pooling == PoolingType.MEAN and (weighted_maps or (weighted and config.name in self.frozen)):
                whose = "a map has some" if weighted_maps else "its collection has some"
                raise ValueError(f"table {config.name!r}: mean pooling takes no per-sample weights, and {whose}")
        hashes = None
        if mapped:
            kind = _UnweightedHash if weighted_maps and not old.is_weighted() else LearnedHash
            hashes = kind(mapped, unknown=self.unknown, packed=self.packed)
            hashes = hashes.to(old.device) if old.device.type != "meta" else hashes
        frozen = [
            FrozenTable(
                name=c.name,
                rows=c.num_embeddings,
                dim=round_up(c.embedding_dim),
                features=tuple(c.feature_names),
                storage=self.storage,
            )
            for c in after
            if c.name in self.frozen
        ]
        return CompressedEmbeddingBagCollection(
            after,
            hashes,
            EmbeddingBagCollection(kept, is_weighted=weighted, device=_META) if kept else None,
            FrozenEmbeddingBagCollection(frozen, old.device, weighted=weighted) if frozen else None,
            old.device,
        )

    def _sequences(self, old: EmbeddingCollection, configs: Any, kept: Any, mapped: dict[str, IdMap]) -> Any:
        for config in configs:
            if config.name in self.frozen:
                raise ValueError(f"table {config.name!r}: only tables of an EmbeddingBagCollection can be frozen")
            one = self.maps.get(config.name)
            if one is not None and (one.ways != 1 or one.weights is not None):
                raise ValueError(
                    f"table {config.name!r}: its map gives an id {one.ways} weighted rows or several, but an "
                    "EmbeddingCollection can look up one unweighted row an id"
                )
        if old.need_indices():
            raise ValueError("compress: an EmbeddingCollection with need_indices=True would return rows for ids")
        hashes = LearnedHash(mapped, unknown=self.unknown, packed=self.packed)
        options = ("use_gather_select", "use_gather_select_per_sharding")
        same = {name: getattr(old, name)() for name in options if hasattr(old, name)}  # TorchRec 1.6 lacks the second
        new = EmbeddingCollection(kept, device=_META, **same)
        hashes = hashes.to(old.device) if old.device.type != "meta" else hashes
        return CompressedEmbeddingCollection(hashes, new, old.device)

    def _check(self, config: Any, weight: torch.Tensor) -> None:
        table, rows = config.name, config.num_embeddings
        one = self.maps.get(table)
        if one is not None and one.num_ids != rows:
            raise ValueError(
                f"table {table!r}: its map is of {one.num_ids} ids, expected {rows}, the rows of the table"
            )
        if table in self.frozen:
            check_source(self.frozen[table], table, rows, config.embedding_dim)
        if (one is not None or table in self.frozen) and hasattr(weight, "_in_backward_optimizers"):
            raise ValueError(
                f"table {table!r}: an optimizer is applied in its backward pass already; compress the model before that"
            )
        trainable = one is not None and table not in self.frozen
        if trainable and self.warm_start and weight.device.type == "meta":
            raise ValueError(f"table {table!r}: its rows are on the device 'meta'; pass warm_start=False")

    def _features(self, configs: Any) -> dict[str, IdMap]:
        """Feature -> its map; a feature has one, whatever the tables that it feeds."""
        of: dict[str, tuple[str, IdMap | None]] = {}
        for config in configs:
            one = self.maps.get(config.name)
            for feature in config.feature_names:
                table, other = of.setdefault(feature, (config.name, one))
                if other is not one:
                    raise ValueError(
                        f"feature {feature!r}: it looks up in the tables {table!r} and {config.name!r}, which must "
                        "have the same map or none"
                    )
        return {feature: one for feature, (_, one) in of.items() if one is not None}

    def _frozen_rows(self, config: Any) -> RowSource:
        source, one = self.frozen[config.name], self.maps.get(config.name)
        if one is None:
            return source
        pooled = config.pooling == PoolingType.MEAN
        return warm_rows(source, one, self.counts.get(config.name), table=config.name, mean_pooled=pooled)[0]

    def _start(self, before: Any, after: Any, table: Any, old: torch.Tensor) -> None:
        weight = table.weight
        if old.device.type != "meta":
            table.to_empty(device=old.device)
            weight = table.weight
            with torch.no_grad():
                after.init_fn(weight)
        weight.requires_grad_(old.requires_grad)
        if not self.warm_start:
            return
        pooled = getattr(before, "pooling", None) == PoolingType.MEAN
        one, counts = self.maps[before.name], self.counts.get(before.name)
        rows, used = warm_rows(old.detach(), one, counts, table=before.name, mean_pooled=pooled)
        with torch.no_grad():
            weight[used.to(weight.device)] = rows[used].to(weight)  # rows of no id keep what init_fn gave them

    def _note(self, before: Any, after: Any, weight: torch.Tensor) -> None:
        name, one = before.name, self.maps.get(before.name)
        size = after.embedding_dim * weight.element_size()
        if name in self.frozen:
            size = row_bytes(self.storage, round_up(after.embedding_dim))
        map_bytes = 0
        if one is not None and one not in self._seen:
            self._seen.add(one)
            held = -(-one.rows.numel() * one.bits // 8) if self.packed else one.rows.nbytes
            map_bytes = held + (0 if one.weights is None else one.weights.nbytes)
        kinds = ["frozen"] * (name in self.frozen) + ["shared"] * (one is not None)
        self.report.append(
            TableReport(
                table=name,
                kind=", ".join(kinds),
                rows_before=before.num_embeddings,
                rows_after=after.num_embeddings,
                bytes_before=weight.nbytes,
                bytes_after=after.num_embeddings * size,
                map_bytes=map_bytes,
            )
        )
