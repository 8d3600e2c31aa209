"""Compress the tables of an existing model: shared rows, frozen rows, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from recpress.modules.compression.collections import (
    PENDING,
    Compressed,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    CompressedFeatureProcessed,
    UnweightedHash,
)
from recpress.modules.compression.optimizers import warn_of_optimizers
from recpress.modules.compression.report import CompressReport, TableChange
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable, Storage, row_bytes
from recpress.modules.frozen.sequence import FrozenEmbeddingCollection
from recpress.modules.hashing.id_map import IdMap, Unknown
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import WarmRows, warm_rows
from recpress.modules.row_files import RowFile, open_rows
from recpress.modules.row_source import PendingRows, RowSource, check_source, load_rows, round_up

_META = torch.device("meta")


def compress(
    model: nn.Module,
    maps: Mapping[str, IdMap],
    frozen: Mapping[str, RowFile] | Iterable[str] | str | None = None,
    *,
    rows: Mapping[str, RowFile] | str | Path | None = None,
    counts: Mapping[str, torch.Tensor] | None = None,
    warm_start: bool = True,
    storage: Storage = "fp32",
    unknown: Unknown = "hash",
    packed: bool = False,
) -> tuple[nn.Module, CompressReport]:
    """Replace tables in the EmbeddingBagCollections and EmbeddingCollections of `model`, in place.

    The signature of the forward, the keys, order and dimensions of its output, and the names in `state_dict` do not
    change. Other tables remain the same modules. An optimizer in the backward pass of a table moves to the smaller
    table. Create other optimizers after this call: replaced weights are new parameters, and frozen tables have no
    parameters.

    Rows are a matrix, a path or (path, key), as in `recpress.modules.row_files.open_rows`: .npy, .pt, .parquet or a
    folder of torch.distributed.checkpoint. For a model on the device "meta", each rank reads only its own shard, when
    DistributedModelParallel shards the model with `recpress.modules.sharders()`, or else in `CompressReport.load`.

    Args:
        model: a model that is not sharded. If it is itself a collection, the returned module is a new one.
        maps: table name -> map of its ids onto fewer rows. Applies to all features of the table.
        frozen: table name -> its rows (ids, dim), which are not trained, or only names (or one name) of tables in
            `rows`. With a map, `warm_rows` gives the stored rows.
        rows: table name -> rows (ids, dim) to start from instead of those of the model; or one path that has the rows
            of all tables of the replaced collections.
        counts: table name -> how often each id is accessed, (ids,). Default: 1 for each id.
        warm_start: initialize a shared, trainable table by `warm_rows` of the old rows, otherwise by its `init_fn`.
        storage: how to store frozen rows.
        unknown, packed: as in `LearnedHash`.

    Returns:
        The model, and a report whose `load` fills the tables after sharding.

    Raises:
        ValueError: the model has no such table; a map, counts or rows have another size; a table is sharded, in a
            subclass of these collections, or behind a module that treats ids in its own way; two tables of a feature
            have different maps. Not supported: mean pooling with weighted maps, or of frozen rows with per-sample
            weights; two rows per id or frozen rows behind a feature processor. The model is then unchanged.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="t", num_embeddings=6, embedding_dim=4, feature_names=["f"])
        >>> model = nn.Sequential(EmbeddingBagCollection([table]))
        >>> id_map = IdMap(rows=torch.arange(6, dtype=torch.int32)[:, None] % 2, num_rows=2)
        >>> model, report = compress(model, {"t": id_map})
        >>> # model = DistributedModelParallel(model, sharders=recpress.modules.sharders())
    """
    counts = counts or {}
    if not isinstance(frozen, Mapping):
        names = [frozen] if isinstance(frozen, str) else list(frozen or ())
        frozen = {name: rows if isinstance(rows, str | Path) else (rows or {}).get(name, "") for name in names}
        for name, source in frozen.items():
            if isinstance(source, str) and not source:
                raise ValueError(f"table {name!r}: it is frozen, but `rows` has no rows of it")
    named = {*maps, *frozen}
    if not named:
        raise ValueError("compress: neither maps nor frozen tables, expected at least one table")
    paths_of = _find_collections(model, named)
    if isinstance(rows, str | Path):
        rows = {table: rows for module in paths_of for table in _tables(module)}
    rows = rows or {}
    for table in counts:
        if table not in maps:
            raise ValueError(f"table {table!r}: there are counts for it, but no map")
    there = {table for module in paths_of for table in _tables(module)}
    for table in rows:
        if table not in there:
            raise ValueError(
                f"table {table!r}: there are rows for it, but it is in no replaced collection; expected one of "
                f"{', '.join(sorted(there))}"
            )
    if storage not in get_args(Storage):
        raise ValueError(f"compress: storage is {storage!r}, expected one of {', '.join(get_args(Storage))}")
    opened = {table: open_rows(source, table) for table, source in frozen.items()}
    given = {table: open_rows(source, table) for table, source in rows.items() if table not in frozen}
    build = _Build(maps, opened, given, counts, warm_start, storage, unknown, packed)
    made = {module: build.collection(module) for module in paths_of}
    build.finish()
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
    inner = {id(m._embedding_bag_collection) for _, m in modules if _is_position_weighted(m)}
    for path, module in modules:
        where = path or "the model"
        if id(module) in inner:
            continue
        if isinstance(module, ShardedModule):
            raise ValueError(f"{where}: {type(module).__name__} is already sharded; compress the model before sharding")
        if isinstance(module, Compressed) and named & set(module.tables()):
            name = next(table for table in module.tables() if table in named)
            raise ValueError(f"table {name!r}: {where} is already compressed, by {type(module).__name__}")
        tables = _tables(module)
        for table in tables:
            if table in named and owner.setdefault(table, (where, module))[1] is not module:
                raise ValueError(
                    f"table {table!r}: two collections have it, {owner[table][0]} and {where}; expected one"
                )
        if named & tables.keys():
            paths_of.setdefault(module, []).append(path)
            parent = model.get_submodule(path.rpartition(".")[0]) if path else None
            if parent is not None and type(parent).__module__.startswith("torchrec.modules."):
                raise ValueError(
                    f"{where}: it is behind {type(parent).__name__}, which treats ids in its own way; expected a "
                    "plain collection"
                )
    missing = sorted(named - owner.keys())
    if missing:
        for path, module in modules:
            if _holds(path, module, missing[0]):
                raise ValueError(
                    f"table {missing[0]!r}: {path or 'the model'} is a {type(module).__name__}, expected exactly an "
                    "EmbeddingBagCollection or EmbeddingCollection of torchrec; compress the model before it is fused "
                    "or quantized"
                )
        there = sorted({table for _, module in modules for table in _tables(module)})
        raise ValueError(f"the model has no table {missing[0]!r}; it has {', '.join(there) or 'none'}")
    return paths_of


def _holds(path: str, module: Any, table: str) -> bool:
    """Whether a module that `compress` does not take has a table of this name."""
    if isinstance(module, nn.EmbeddingBag | nn.Embedding):
        return path.rpartition(".")[2] == table
    configs = getattr(module, "embedding_bag_configs", None) or getattr(module, "embedding_configs", None)
    return callable(configs) and any(config.name == table for config in configs())


def _tables(module: Any) -> dict[str, Any]:
    if type(module) is EmbeddingBagCollection:
        return {config.name: config for config in module.embedding_bag_configs()}
    if type(module) is EmbeddingCollection:
        return {config.name: config for config in module.embedding_configs()}
    if _is_position_weighted(module):
        return _tables(module._embedding_bag_collection)
    return {}


def _is_position_weighted(module: Any) -> bool:
    """Whether a module weighs ids by their positions alone, so that one-row maps can be applied before it."""
    if type(module) is not FeatureProcessedEmbeddingBagCollection:
        return False
    processors = module._feature_processors
    each = processors.values() if isinstance(processors, nn.ModuleDict) else [processors]
    return all(type(p) in (PositionWeightedModule, PositionWeightedModuleCollection) for p in each)


def _tables_of(configs: Any) -> dict[str, list[str]]:
    """Feature -> the tables that it looks up."""
    found: dict[str, list[str]] = {}
    for config in configs:
        for feature in config.feature_names:
            found.setdefault(feature, []).append(config.name)
    return found


class _Build:
    """Builds the new collections and the report. Does not change the old collections before `finish`."""

    def __init__(
        self,
        maps: Mapping[str, IdMap],
        frozen: Mapping[str, RowSource],
        given: Mapping[str, RowSource],
        counts: Mapping[str, torch.Tensor],
        warm_start: bool,
        storage: Storage,
        unknown: Unknown,
        packed: bool,
    ) -> None:
        """given: rows to start from, of tables that are not frozen."""
        self.maps, self.frozen, self.given, self.counts = maps, frozen, given, counts
        self.warm_start, self.storage, self.unknown, self.packed = warm_start, storage, unknown, packed
        self.report: list[TableChange] = []
        self.rows: dict[str, RowSource] = {}
        self._seen: set[IdMap] = set()
        self._replaced: dict[str, torch.Tensor] = {}
        self._late: list[Callable[[], None]] = []

    def finish(self) -> None:
        """What changes weights that remain in the model, and what warns."""
        for change in self._late:
            change()
        warn_of_optimizers(self._replaced)

    def collection(self, old: Any) -> Any:
        if _is_position_weighted(old):
            return self._processed(old)
        bags = isinstance(old, EmbeddingBagCollection)
        configs = old.embedding_bag_configs() if bags else old.embedding_configs()
        mapped, after, kept = self._plan(configs, old.embedding_bags if bags else old.embeddings)
        weighted_maps = any(m.weights is not None for m in mapped.values())
        if bags:
            self._check_pooling(old, configs, weighted_maps)
        weighted = bags and (old.is_weighted() or weighted_maps)
        hashes = self._hashes(mapped, configs, old, weighted_maps and not (bags and old.is_weighted()))
        frozen_tables = [
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
        trainable: Any = None
        frozen: Any = None
        if bags:
            if kept:
                trainable = EmbeddingBagCollection(kept, is_weighted=weighted, device=_META)
            if frozen_tables:
                frozen = FrozenEmbeddingBagCollection(frozen_tables, old.device, weighted=weighted)
        else:
            if kept:
                trainable = self._sequences(old, kept)
            if frozen_tables:
                frozen = FrozenEmbeddingCollection(frozen_tables, old.device)
        must_load = self._fill(old, configs, after, trainable, frozen)
        old_rows = _old_rows(configs, after)
        if bags:
            return CompressedEmbeddingBagCollection(
                after, hashes, trainable, frozen, old.device, old_rows=old_rows, must_load=must_load
            )
        return CompressedEmbeddingCollection(
            after, hashes, trainable, frozen, old.device,
            need_indices=old.need_indices(), old_rows=old_rows, must_load=must_load,
        )  # fmt: skip

    def _processed(self, old: FeatureProcessedEmbeddingBagCollection) -> CompressedFeatureProcessed:
        tables = old._embedding_bag_collection
        configs = tables.embedding_bag_configs()
        for config in configs:
            one = self.maps.get(config.name)
            if config.name in self.frozen or (one is not None and (one.rows_per_id > 1 or one.weights is not None)):
                raise ValueError(
                    f"table {config.name!r}: it is behind {type(old).__name__}, where expected a map with one "
                    "unweighted row per id, and no frozen rows"
                )
        mapped, after, kept = self._plan(configs, tables.embedding_bags)
        hashes = self._hashes(mapped, configs, tables, False)
        assert hashes is not None
        trainable = EmbeddingBagCollection(kept, is_weighted=True, device=_META)
        must_load = self._fill(tables, configs, after, trainable, None)
        new = FeatureProcessedEmbeddingBagCollection(trainable, _processors(old))
        return CompressedFeatureProcessed(hashes, new, old_rows=_old_rows(configs, after), must_load=must_load)

    def _plan(self, configs: Any, old_tables: Any) -> tuple[dict[str, IdMap], list[Any], list[Any]]:
        """(feature -> its map, all tables with their new rows, those of them that are trainable)."""
        for config in configs:
            self._check(config, old_tables[config.name].weight)
        after = [
            replace(c, num_embeddings=self.maps[c.name].num_rows) if c.name in self.maps else replace(c)
            for c in configs
        ]
        return self._features(configs), after, [c for c in after if c.name not in self.frozen]

    def _fill(self, old: Any, configs: Any, after: Any, trainable: Any, frozen: Any) -> bool:
        """Move or create the tables. Returns whether the trainable ones start from rows that sharding must not lose."""
        group = "embedding_bags" if isinstance(old, EmbeddingBagCollection) else "embeddings"
        old_tables: Any = getattr(old, group)
        tables: Any = getattr(trainable, group, None)
        if trainable is not None:  # built on "meta", so that unchanged tables are not allocated twice
            trainable._device = old.device
        of_frozen: dict[str, RowSource] = {}
        of_trainable: dict[str, RowSource] = {}
        must = False
        for before, config in zip(configs, after, strict=True):
            name, weight = config.name, old_tables[config.name].weight
            on_meta = weight.device.type == "meta"
            if name in self.frozen:
                of_frozen[name] = self._frozen_rows(before, on_meta)
                if old.device.type != "meta":
                    frozen.load(name, of_frozen[name])
                self._replaced[name] = weight
            else:
                source = self.given.get(name)
                if name in self.maps:
                    must |= self.warm_start
                    self._replaced[name] = weight
                    self._start(before, config, tables[name], weight)
                    if on_meta and self.warm_start:
                        assert source is not None
                        of_trainable[name] = self._warm(WarmRows, source, before)
                else:
                    tables[name] = old_tables[name]
                    if source is not None:
                        must = True
                        check_source(source, name, config.num_embeddings, config.embedding_dim)
                        if on_meta:
                            of_trainable[name] = source
                        else:
                            self._late.append(partial(load_rows, weight, name, source))
                if not on_meta:
                    of_trainable[name] = tables[name].weight.detach()
            if name in self.maps or name in self.frozen:
                self._note(before, config, weight)
        self.rows |= of_frozen | of_trainable
        if frozen is not None:
            frozen.pending = PendingRows(of_frozen)
        if of_trainable:
            setattr(trainable, PENDING, PendingRows(of_trainable))
        return must

    def _hashes(self, mapped: dict[str, IdMap], configs: Any, old: Any, only_of_maps: bool) -> LearnedHash | None:
        """only_of_maps: per-sample weights are those of the maps alone."""
        if not mapped:
            return None
        hashes = (UnweightedHash if only_of_maps else LearnedHash)(mapped, unknown=self.unknown, packed=self.packed)
        hashes.tables = _tables_of(configs)
        return hashes.to(old.device) if old.device.type != "meta" else hashes

    def _check_pooling(self, old: Any, configs: Any, weighted_maps: bool) -> None:
        weighted = old.is_weighted() or weighted_maps
        for config in configs:
            if config.pooling == PoolingType.MEAN and (weighted_maps or (weighted and config.name in self.frozen)):
                whose = "a map has weights" if weighted_maps else "its collection has weights"
                raise ValueError(
                    f"table {config.name!r}: mean pooling does not support per-sample weights, and {whose}"
                )

    def _sequences(self, old: EmbeddingCollection, kept: Any) -> EmbeddingCollection:
        options = ("use_gather_select", "use_gather_select_per_sharding")
        same = {name: getattr(old, name)() for name in options if hasattr(old, name)}  # TorchRec 1.6 lacks the second
        return EmbeddingCollection(kept, device=_META, **same)

    def _check(self, config: Any, weight: torch.Tensor) -> None:
        table, rows = config.name, config.num_embeddings
        one = self.maps.get(table)
        if one is not None and one.num_ids != rows:
            raise ValueError(f"table {table!r}: its map has {one.num_ids} ids, expected {rows}, the rows of the table")
        if table in self.frozen:
            check_source(self.frozen[table], table, rows, config.embedding_dim)
        trainable = one is not None and table not in self.frozen
        if trainable and self.warm_start:
            if table in self.given:
                check_source(self.given[table], table, rows, config.embedding_dim)
            elif weight.device.type == "meta":
                raise ValueError(
                    f"table {table!r}: its rows are on the device 'meta'; pass rows={{{table!r}: array, file or "
                    "checkpoint folder}, or warm_start=False to start from random rows"
                )

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

    def _frozen_rows(self, config: Any, on_meta: bool) -> RowSource:
        """The rows to store; with a map, computed on access if the model is on "meta", because it will be sharded."""
        source, one = self.frozen[config.name], self.maps.get(config.name)
        if one is None:
            return source
        made = self._warm(WarmRows if on_meta else warm_rows, source, config)
        return made if on_meta else made[0]

    def _warm(self, kind: Any, source: RowSource, config: Any) -> Any:
        """`warm_rows` or `WarmRows` of a table with a map."""
        mean_pooled = getattr(config, "pooling", None) == PoolingType.MEAN
        one, counts = self.maps[config.name], self.counts.get(config.name)
        return kind(source, one, counts, table=config.name, mean_pooled=mean_pooled)

    def _start(self, before: Any, after: Any, table: Any, old: Any) -> None:
        """Create the rows of a trainable table with a map, on the device of the old ones."""
        if old.device.type != "meta":
            table.to_empty(device=old.device)
            with torch.no_grad():
                after.init_fn(table.weight)
        weight = table.weight
        weight.requires_grad_(old.requires_grad)
        if self.warm_start and old.device.type != "meta":
            source = self.given.get(before.name, old.detach())
            rows, used = self._warm(warm_rows, source, before)
            with torch.no_grad():  # rows without ids keep the values of init_fn
                weight[used.to(weight.device)] = rows[used].to(weight)
        if hasattr(old, "_in_backward_optimizers"):
            for kind, options in zip(old._optimizer_classes, old._optimizer_kwargs, strict=True):
                _apply_optimizer_in_backward(kind, [weight], options)

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


def _old_rows(configs: Any, after: Any) -> dict[str, int]:
    """Table -> its number of rows before, if it changed."""
    pairs = zip(configs, after, strict=True)
    return {old.name: old.num_embeddings for old, new in pairs if old.num_embeddings != new.num_embeddings}


def _processors(old: FeatureProcessedEmbeddingBagCollection) -> Any:
    """The feature processors as its constructor takes them."""
    found = old._feature_processors
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else found
