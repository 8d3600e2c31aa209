"""The training run of a model of labels that `recpress plan --model` plans, with or without its log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from recpress.data.dataset.log import Log
from recpress.data.dataset.object_store import is_remote
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.data.stream.memory import values_per_row
from recpress.modules.row_source import round_up
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.features.feature_set import Feature, FeatureSet, FeatureTable
from recpress.trainer.features.resolve import open_with_features, resolve_features
from recpress.trainer.features.saved import SavedRows
from recpress.trainer.features.tables import DIM, shared_option
from recpress.trainer.plan.config import PlanModelConfig
from recpress.trainer.plan.job import MapShape
from recpress.trainer.train.model_stage import MOST, hold_out

_LISTS = ("list", "sequence")


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """A training run of a model of labels."""

    config: PlanModelConfig
    features: FeatureSet
    maps: dict[str, MapShape]
    """Of tables, by name."""
    rows: int
    """Of train; 0: unknown."""
    sampled: int
    """Of the sample; 0: unknown."""
    group_rows: int
    """Rows of the largest row group."""
    row_bytes: int
    """Of a row in the stream."""
    values: float
    """Ids of a row of a batch, the mean."""
    validation_rows: int
    feature_bytes: int
    """Of the side tables, which each rank stores."""

    @property
    def batch_size(self) -> int:
        """Rows of a batch of one rank."""
        return self.config.stream.batch_size

    @property
    def sharding_types(self) -> dict[str, str]:
        """Table -> how the features say to shard it."""
        return {table.name: table.sharding for table in self.features.tables if table.sharding != "auto"}

    @property
    def keep_best(self) -> bool:
        """A copy of the best weights is in memory."""
        return self.config.evaluation.while_training

    @property
    def uploads(self) -> bool:
        """Checkpoints go to an object store."""
        return is_remote(self.config.checkpoint.folder or self.config.out)

    @property
    def metrics(self) -> bool:
        """TorchRec's metrics are computed."""
        return bool(self.config.metrics.window)

    @property
    def validation_bytes(self) -> int:
        """Of the validation rows of all ranks."""
        return self.validation_rows * self.row_bytes

    def with_tables(self, maps: Mapping[str, MapShape], *, frozen: bool) -> LabelJob:
        """The same run with other maps; with or without frozen rows."""
        tables = [table if frozen else replace(table, frozen=None, side=None) for table in self.features.tables]
        return replace(self, maps=dict(maps), features=replace(self.features, tables=tables))


def label_job(config: PlanModelConfig) -> LabelJob:
    """The run of these options.

    Raises:
        InputError: log, features, factors, maps or settings cannot be used.
    """
    if not config.data:
        return _described(config)
    with process_group("cpu"):
        return _of_log(config)


def _of_log(config: PlanModelConfig) -> LabelJob:
    log = open_with_features(config.data, chosen_schema(config.schema), config.features, skip=False)
    label = log.schema.label
    if not label:
        raise InputError(f"{log.path}: no label; expected --schema.label, a column of 0 and 1, or of ratings")
    opened = open_maps(config.maps, log) if config.maps else None
    features = resolve_features(log, config.features, maps=opened, dim=config.dim, label=label)
    lengths = {feature.name: _length(log, features, feature) for feature in features.features}
    held = hold_out(config, log)
    selected = Selection(log.train, config.sample, hold_out=held) if held else Selection(log.train, config.sample)
    validation = 0
    if held is not None:
        validation = Selection(log.train, config.sample).num_rows - selected.num_rows
    elif config.evaluation.while_training and log.val is not None:
        validation = min(MOST, log.val.num_rows)
    tensors: list[torch.Tensor] = []
    for side in features.sides.values():
        tensors += side.floats.values()
        for values in side.ids.categorical.values() if side.ids else ():
            tensors += values if isinstance(values, tuple) else (values,)
    return LabelJob(
        config=config,
        features=features,
        maps={t.name: MapShape.of(t.id_map) for t in features.tables if t.id_map is not None},
        rows=log.train.num_rows,
        sampled=selected.num_rows,
        group_rows=max(group.num_rows for group in log.train.groups),
        row_bytes=_row_bytes(features, lengths),
        values=_values(features, lengths),
        validation_rows=validation,
        feature_bytes=sum(tensor.nbytes for tensor in tensors),
    )


def _length(log: Log, features: FeatureSet, feature: Feature) -> float:
    """Mean number of values of a feature in a row of the log, or of its side table."""
    if feature.kind not in _LISTS:
        return 1.0
    if feature.source == "log":
        return values_per_row(log.train, feature.column)
    side = features.sides[feature.source].ids
    assert side is not None
    values, offsets = side.categorical[feature.column]
    return len(values) / max(1, len(offsets) - 1)


def _values(features: FeatureSet, lengths: Mapping[str, float]) -> float:
    """Ids of a row of a batch."""
    each = (min(lengths[f.name], f.config.max_length or math.inf) for f in features.features if f.kind != "float")
    return sum(each)


def _row_bytes(features: FeatureSet, lengths: Mapping[str, float]) -> int:
    """Bytes of a row in the stream, as `data.stream.memory` counts them: 8 of an id, 4 of a number or label, and
    twice 8 of each value of a list, its offset and its place."""
    columns = {f.column: f for f in features.features if f.source == "log"}
    total = 4.0 + 8 * len({f.source for f in features.features if f.source != "log"})
    for feature in columns.values():
        if feature.kind in _LISTS:
            total += 2 * 8 * (lengths[feature.name] + 2)
        else:
            total += 4 if feature.kind in ("float", "bucketized") else 8
    return round(total)


def _described(config: PlanModelConfig) -> LabelJob:
    """Of a log that does not exist: the features have the numbers of ids."""
    features = [_described_feature(name, given) for name, given in config.features.items()]
    of_table: dict[str, list[Feature]] = {}
    for feature in features:
        if feature.kind != "float":
            of_table.setdefault(feature.table, []).append(feature)
    if not of_table:
        raise InputError("features: none with an embedding table; expected at least one, or data, a log")
    maps: dict[str, MapShape] = {}
    tables = []
    of_frozen = [f.config.dimension for f in features if f.config.frozen]
    dim = config.dim or (round_up(max(of_frozen)) if of_frozen else DIM)
    for name, sharing in of_table.items():
        ids = max(f.config.buckets + 1 if f.kind == "bucketized" else f.config.num_ids for f in sharing)
        width = shared_option(name, sharing, "dimension", 0) or dim
        frozen = shared_option(name, sharing, "frozen", None)
        hashed: FeatureHash | None = shared_option(name, sharing, "hash", None)
        if hashed is not None:
            if hashed.rows > ids:
                raise InputError(f"table '{name}': hash.rows is {hashed.rows:,}, but the table has {ids:,} ids")
            each = 2 if hashed.method in ("double", "quotient-remainder") else 1
            maps[name] = MapShape(num_ids=ids, num_rows=hashed.rows, rows_per_id=each)
        if not frozen and width % 4:
            raise InputError(f"table '{name}': dimension is {width}, expected a multiple of 4")
        tables.append(
            FeatureTable(
                name=name,
                num_ids=ids,
                dim=width,
                pooling=shared_option(name, sharing, "pooling", "sum"),
                features=tuple(f.name for f in sharing),
                id_map=None,
                frozen=SavedRows(frozen, ids, width) if frozen else None,
                side=None,
                storage=shared_option(name, sharing, "storage", "fp32"),
                sharding=shared_option(name, sharing, "sharding", "auto"),
            )
        )
    found = FeatureSet(features, tables, {}, {}, dim)
    lengths = {f.name: config.list_length if f.kind in _LISTS else 1.0 for f in features}
    held = 0
    if config.evaluation.while_training and config.rows:
        held = min(MOST, math.ceil(0.1 * config.rows * config.sample.rate))
    return LabelJob(
        config=config,
        features=found,
        maps=maps,
        rows=config.rows,
        sampled=math.ceil(config.rows * config.sample.rate) - held,
        group_rows=min(1 << 18, config.rows) if config.rows else 1 << 18,
        row_bytes=_row_bytes(found, lengths),
        values=_values(found, lengths),
        validation_rows=held,
        feature_bytes=0,
    )


def _described_feature(name: str, given: FeatureConfig) -> Feature:
    where = f"features.{name}"
    config = replace(given, kind=given.kind or "id")
    config.check(name)
    if config.kind not in ("float", "bucketized") and not config.num_ids:
        raise InputError(f"{where}.num_ids: missing; expected it without data, which has the number of ids")
    if config.frozen and not config.dimension:
        raise InputError(f"{where}.dimension: missing; expected that of the frozen rows, without data")
    if config.kind == "bucketized" and config.boundaries:
        config = replace(config, buckets=len(config.boundaries) + 1)
    return Feature(name, given.column or name, "log", config)
