"""Compress the tables of an existing model: shared rows, frozen rows, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.compression.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    UnweightedHash,
)
from recpress.modules.compression.report import CompressReport, TableChange
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable, Storage, row_bytes
from recpress.modules.hashing.id_map import IdMap, Unknown
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import warm_rows
from recpress.modules.row_source import RowSource, check_source, round_up

_META = torch.device("meta")


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
    """Replace tables in the EmbeddingBagCollections and EmbeddingCollections of `model`, in place.

    The signature of the forward, and the keys, order and dimensions of its output do not change. Other tables remain
    the same modules. Create optimizers after this call: replaced weights are new parameters, and frozen tables have no
    parameters.

    Args:
        model: a model that is not sharded. If it is itself a collection, the returned module is a new one.
        maps: table name -> map of its ids onto fewer rows. Applies to all features of the table.
        frozen: table name -> its rows (ids, dim), which are not trained. With a map, `warm_rows` gives the stored rows.
        counts: table name -> how often each id is accessed, (ids,). Default: 1 for each id.
        warm_start: initialize a shared, trainable table by `warm_rows` of the old rows, otherwise by its `init_fn`.
        storage: how to store frozen rows.
        unknown, packed: as in `LearnedHash`.

    Returns:
        The model, and a report whose `load` fills the tables after sharding.

    Raises:
        ValueError: the model has no such table; a map, counts or rows have another size; a table is sharded, has an
            optimizer in its backward pass, or is behind a module that treats ids in its own way; two tables of a
            feature have different maps. Not supported: two rows per id or frozen rows in an EmbeddingCollection; mean
            pooling with weighted maps, or of frozen rows with per-sample weights. The model is then unchanged.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="t", num_embeddings=6, embedding_dim=4, feature_names=["f"])
        >>> model = nn.Sequential(EmbeddingBagCollection([table]))
        >>> id_map = IdMap(rows=(torch.arange(6, dtype=torch.int32) % 2)[:, None], num_rows=2)
        >>> model, report = compress(model, {"t": id_map})
        >>> # shard the model here: model = DistributedModelParallel(model)
        >>> report.load(model)  # because sharding discards the rows of every table
    """
    frozen, counts = frozen or {}, counts or {}
    named = {*maps, *frozen}
    if not named:
        raise ValueError("compress: neither maps nor frozen tables, expected at least one table")
    paths_of = _find_collections(model, named)
    for table in counts:
        if table not in maps:
            raise ValueError(f"table {table!r}: there are counts for it, but no map")
    if storage not in get_args(Storage):
        raise ValueError(f"compress: storage is {storage!r}, expected one of {', '.join(get_args(Storage))}")
    build = _Build(maps, frozen, counts, warm_start, storage, unknown, packed)
    made = {module: build.collection(module) for module in paths_of}
    for module, paths in paths_of.items():
        for path in paths:
            if not path:
                model = made[module]
                continue
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[module])
    return model, CompressReport(tables=build.report, rows=build.rows)


def _find_collections(model: nn.Module, named: set[str]) -> dict[nn.Module, list[str]]:
    """Collections with named tables -> all paths to them."""
    modules = list(model.named_modules(remove_duplicate=False))
    owner: dict[str, tuple[str, nn.Module]] = {}
    paths_of: dict[nn.Module, list[str]] = {}
    for path, module in modules:
        where = path or "the model"
        if isinstance(module, ShardedModule):
            raise ValueError(f"{where}: {type(module).__name__} is already sharded; compress the model before sharding")
        tables = _tables(module)
        for table in tables:
            if table in named and owner.setdefault(table, (where, module))[1] is not module:
                raise ValueError(
                    f"table {table!r}: two collections have it, {owner[table][0]} and {where}; expected one"
                )
        if named & tables.keys():
            paths_of.setdefault(module, []).append(path)
            if path:
                parent = model.get_submodule(path.rpartition(".")[0])
                if type(parent).__module__.startswith("torchrec.modules."):
                    raise ValueError(
                        f"{where}: it is behind {type(parent).__name__}, which treats ids in its own way; expected a "
                        "plain collection"
                    )
    missing = sorted(named - owner.keys())
    if missing:
        there = sorted({table for _, module in modules for table in _tables(module)})
        raise ValueError(f"the model has no table {missing[0]!r}; it has {', '.join(there) or 'none'}")
    return paths_of


def _tables(module: Any) -> dict[str, Any]:
    if type(module) is EmbeddingBagCollection:
        return {config.name: config for config in module.embedding_bag_configs()}
    if type(module) is EmbeddingCollection:
        return {config.name: config for config in module.embedding_configs()}
    return {}


def _tables_of(configs: Any) -> dict[str, list[str]]:
    """Feature -> the tables that it looks up."""
    found: dict[str, list[str]] = {}
    for config in configs:
        for feature in config.feature_names:
            found.setdefault(feature, []).append(config.name)
    return found


class _Build:
    """Builds the new collections and the report. Does not change the old collections."""

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
        self.report: list[TableChange] = []
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
        if new.trainable is not None:  # built on "meta", so that unchanged tables are not allocated twice
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
                whose = "a map has weights" if weighted_maps else "its collection has weights"
                raise ValueError(
                    f"table {config.name!r}: mean pooling does not support per-sample weights, and {whose}"
                )
        hashes = None
        if mapped:
            kind = UnweightedHash if weighted_maps and not old.is_weighted() else LearnedHash
            hashes = kind(mapped, unknown=self.unknown, packed=self.packed)
            hashes.tables = _tables_of(configs)
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
                raise ValueError(f"table {config.name!r}: frozen tables need an EmbeddingBagCollection")
            one = self.maps.get(config.name)
            if one is not None and (one.rows_per_id != 1 or one.weights is not None):
                raise ValueError(
                    f"table {config.name!r}: its map has {one.rows_per_id} rows per id"
                    f"{'' if one.weights is None else ' with weights'}, expected one unweighted row per id for an "
                    "EmbeddingCollection"
                )
        if old.need_indices():
            raise ValueError(
                "compress: an EmbeddingCollection with need_indices=True would return rows in place of ids"
            )
        hashes = LearnedHash(mapped, unknown=self.unknown, packed=self.packed)
        hashes.tables = _tables_of(configs)
        options = ("use_gather_select", "use_gather_select_per_sharding")
        same = {name: getattr(old, name)() for name in options if hasattr(old, name)}  # TorchRec 1.6 lacks the second
        new = EmbeddingCollection(kept, device=_META, **same)
        hashes = hashes.to(old.device) if old.device.type != "meta" else hashes
        return CompressedEmbeddingCollection(hashes, new, old.device)

    def _check(self, config: Any, weight: torch.Tensor) -> None:
        table, rows = config.name, config.num_embeddings
        one = self.maps.get(table)
        if one is not None and one.num_ids != rows:
            raise ValueError(f"table {table!r}: its map has {one.num_ids} ids, expected {rows}, the rows of the table")
        if table in self.frozen:
            check_source(self.frozen[table], table, rows, config.embedding_dim)
        if (one is not None or table in self.frozen) and hasattr(weight, "_in_backward_optimizers"):
            raise ValueError(
                f"table {table!r}: its backward pass already applies an optimizer; compress the model before that"
            )
        trainable = one is not None and table not in self.frozen
        if trainable and self.warm_start and weight.device.type == "meta":
            raise ValueError(f"table {table!r}: its rows are on the device 'meta'; pass warm_start=False")

    def _features(self, configs: Any) -> dict[str, IdMap]:
        """Feature -> its map. All tables of a feature must have the same map."""
        of: dict[str, tuple[str, IdMap | None]] = {}
        for config in configs:
            one = self.maps.get(config.name)
            for feature in config.feature_names:
                table, other = of.setdefault(feature, (config.name, one))
                if other is not one:
                    raise ValueError(
                        f"feature {feature!r}: it looks up in the tables {table!r} and {config.name!r}, which have "
                        "different maps; expected the same map or none"
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
            weight[used.to(weight.device)] = rows[used].to(weight)  # rows without ids keep the values of init_fn

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
            TableChange(
                table=name,
                kind=", ".join(kinds),
                rows_before=before.num_embeddings,
                rows_after=after.num_embeddings,
                bytes_before=weight.nbytes,
                bytes_after=after.num_embeddings * size,
                map_bytes=map_bytes,
            )
        )
