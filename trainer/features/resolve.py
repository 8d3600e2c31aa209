"""Resolves the features of a run: the columns of the log, and the embedding tables with their ids, maps and rows.

Without a configuration, the features are all columns of the schema (ids, categories and floats) and of the side
tables `users.parquet` and `items.parquet`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from recpress.data.config import Schema
from recpress.data.dataset.columns import Column, check_type, decode, is_list
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.side_table import SideTable
from recpress.data.errors import InputError
from recpress.trainer.artifacts.id_maps import HashArtifact
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.config import FeatureConfig, Kind
from recpress.trainer.features.feature_set import Feature, FeatureSet, SideColumns, Source
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.features.sampled_rows import sampled_rows
from recpress.trainer.features.tables import TableBuilder
from recpress.trainer.open_log import open_on_all_ranks


def resolve_features(
    log: Log,
    given: Mapping[str, FeatureConfig],
    *,
    maps: HashArtifact | None,
    dim: int,
    label: str | None,
    earlier: Callable[[str, FeatureConfig], Numbers | None] = lambda name, config: None,
) -> FeatureSet:
    """The features, by default those of the schema. Collective.

    Args:
        maps: id maps of tables, by the column or the side that they map.
        dim: of tables without a dimension; 0: the default.
        label: the label, which is no feature.
        earlier: (name, configuration) of a number -> its statistics in an earlier model, to use instead of those of
            train.

    Raises:
        InputError: a feature, table, map or frozen rows do not fit the log or each other. On every rank.
    """
    features: list[Feature] = []
    with raise_on_all_ranks():
        sides = {side: table for side in SIDES if (table := log.features(side)) is not None}
        features = _features(log, given, sides, label)
    numbers = _numbers(log, features, sides, earlier)
    found: FeatureSet | None = None
    with raise_on_all_ranks():
        used = {side: side_columns(log, side, table, features) for side, table in sides.items()}
        held = {side: columns for side, columns in used.items() if columns is not None}
        tables = TableBuilder(log, features, numbers, held, maps, dim)
        found = FeatureSet(features, tables.build(), numbers, held, tables.dim)
    assert found is not None
    return found


def check_features(log: Log, given: Mapping[str, FeatureConfig], label: str | None) -> None:
    """Raise InputError if the log lacks the label, or the column of a feature. Reads no rows."""
    if not label:
        raise InputError(f"{log.path}: no label; expected --schema.label, a column of 0 and 1, or of ratings")
    _features(log, given, {side: table for side in SIDES if (table := log.features(side)) is not None}, label)


def open_with_features(path: str, schema: Schema | None, given: Mapping[str, FeatureConfig], *, skip: bool) -> Log:
    """The log, which reads columns of features even if its schema does not name them. Collective.

    Args:
        skip: skip corrupt files and row groups.

    Raises:
        InputError: the log cannot be opened. On every rank.
    """
    log = open_on_all_ranks(path, schema, skip=skip, pairs=False)
    if more := _unread_columns(log, given):
        schema = log.schema
        categorical = [name for name, role in more.items() if role == "categorical"]
        floats = [name for name, role in more.items() if role == "floats"]
        schema = replace(schema, categorical=(*schema.categorical, *categorical), floats=(*schema.floats, *floats))
        log = open_on_all_ranks(path, schema, skip=skip, pairs=False)
    return log


def _unread_columns(log: Log, given: Mapping[str, FeatureConfig]) -> dict[str, Literal["categorical", "floats"]]:
    """Columns of features that the files of the log have, but its schema does not name -> their role."""
    kinds = _arrow(log)
    found: dict[str, Literal["categorical", "floats"]] = {}
    for name, config in given.items():
        column = config.column or name
        if column not in log.train.columns and column in kinds:
            number = config.kind in ("float", "bucketized") or (
                config.kind is None and not is_list(kinds[column]) and not pa.types.is_integer(kinds[column])
            )
            found[column] = "floats" if number else "categorical"
    return found


def _arrow(log: Log) -> dict[str, pa.DataType]:
    """Types of the columns of the first file."""
    metadata = next((file.metadata for file in log.train.files if file.metadata is not None), None)
    if metadata is None:
        return {}
    schema = metadata.schema.to_arrow_schema()
    return {field.name: field.type for field in schema}


def _features(
    log: Log, given: Mapping[str, FeatureConfig], sides: Mapping[Side, pa.Table], label: str | None
) -> list[Feature]:
    kinds = _arrow(log)
    known: dict[str, tuple[Source, Kind]] = {}
    for side, table in sides.items():
        for field in table.schema:
            if (kind := _kind(field.type)) is not None:
                known[field.name] = side, kind
    for name, read in log.train.columns.items():
        if read.role in ("id", "categorical", "float") and name != label:
            listed = name in kinds and is_list(kinds[name])
            known[name] = "log", "float" if read.role == "float" else "list" if listed else "id"
    if not given:
        given = {name: FeatureConfig() for name in known}
    found = []
    for name, config in given.items():
        column = config.column or name
        if column not in known:
            what = "the label is no feature" if column == label else f"{log.path} has no column '{column}' for it"
            raise InputError(f"features.{name}: {what}; it has {', '.join(known)}")
        source, kind = known[column]
        config = replace(config, kind=config.kind or kind)
        if (config.kind in ("float", "bucketized")) != (kind == "float"):
            raise InputError(f"features.{name}.kind is '{config.kind}', but column '{column}' holds {_said(kind)}")
        if (config.kind == "id") != (kind == "id") and kind != "float":
            raise InputError(f"features.{name}.kind is '{config.kind}', but column '{column}' holds {_said(kind)}")
        config.check(name)
        found.append(Feature(name, column, source, config))
    return found


def _said(kind: Kind) -> str:
    return {"id": "one id per row", "list": "lists of ids", "float": "numbers"}[kind]


def _kind(kind: pa.DataType) -> Kind | None:
    if is_list(kind):
        return "list" if pa.types.is_integer(kind.value_type) else None
    if pa.types.is_integer(kind):
        return "id"
    return "float" if pa.types.is_floating(kind) else None


def _numbers(
    log: Log,
    features: Sequence[Feature],
    sides: Mapping[Side, pa.Table],
    earlier: Callable[[str, FeatureConfig], Numbers | None],
) -> dict[str, Numbers]:
    """Statistics of numbers, computed by rank 0. Collective."""
    numeric = [feature for feature in features if feature.kind in ("float", "bucketized")]
    before = {f.name: numbers for f in numeric if (numbers := earlier(f.name, f.config)) is not None}
    numeric = [feature for feature in numeric if feature.name not in before]
    found: list[dict[str, Numbers]] = [{}]
    with raise_on_all_ranks():
        if numeric and dist.get_rank() == 0:
            names = [feature.column for feature in numeric if feature.source == "log"]
            parts = [part for part in sampled_rows(log, names)] if names else []
            for feature in numeric:
                if feature.source == "log":
                    values = np.concatenate([part[feature.column] for part in parts])
                else:
                    values = _floats(sides[feature.source], feature.column, f"{log.path}/{feature.source}s.parquet")
                found[0][feature.name] = Numbers.fit(feature.config, values)
    dist.broadcast_object_list(found)
    return before | found[0]


def _floats(table: pa.Table, name: str, where: str) -> np.ndarray:
    column = Column(name, "float")
    check_type(column, table.schema, where)
    found = decode(column, table.column(name), where)
    assert isinstance(found, np.ndarray)
    return found


def side_columns(log: Log, side: Side, table: pa.Table, features: Sequence[Feature]) -> SideColumns | None:
    """The columns of a side table that are features; None if none is."""
    mine = [feature for feature in features if feature.source == side]
    if not mine:
        return None
    where = f"{log.path}/{side}s.parquet"
    ids = list(dict.fromkeys(f.column for f in mine if f.kind not in ("float", "bucketized")))
    floats = {f.column: f for f in mine if f.kind in ("float", "bucketized")}
    return SideColumns(
        SideTable.from_arrow(table, ids, [], where) if ids else None,
        {name: torch.from_numpy(_floats(table, name, where).copy()) for name in floats},
    )
