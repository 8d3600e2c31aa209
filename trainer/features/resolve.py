"""Resolves the features of a run: the columns of the log, and the embedding tables with their ids, maps and rows.

Without a configuration, the features are all columns of the schema (ids, categories and floats) and of the side
tables `users.parquet` and `items.parquet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from recpress.data.config import Schema
from recpress.data.dataset import artifact
from recpress.data.dataset.columns import Column, Jagged, check_type, decode, is_list
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.parquet_split import iter_row_groups, largest_id
from recpress.data.dataset.side_table import SideTable
from recpress.data.errors import InputError
from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.artifacts.id_maps import HashArtifact
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.config import FACTORIZED, FeatureConfig, Kind
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.open_log import open_on_all_ranks

DIM = 16
"""Dimension of tables by default."""
SAMPLED_ROWS = 1 << 20
"""About as many rows of train, from row groups at even distances, give the statistics of numbers."""
Source = Literal["log", "user", "item"]


@dataclass(frozen=True)
class Feature:
    """One feature of the batches."""

    name: str
    column: str
    source: Source
    """`log`, or the side whose table has the column."""
    config: FeatureConfig
    """With its kind."""

    @property
    def kind(self) -> Kind:
        assert self.config.kind is not None
        return self.config.kind

    @property
    def table(self) -> str:
        return self.config.table or self.name


class FrozenRows(Protocol):
    """The rows of frozen tables: a `FactorsArtifact`."""

    @property
    def path(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def table(self, side: Side) -> Any:
        """(ids, dim) float32."""

    def counts(self, side: Side) -> Any:
        """(ids, 1)."""


@dataclass(frozen=True)
class FeatureTable:
    """An embedding table."""

    name: str
    num_ids: int
    dim: int
    pooling: Literal["sum", "mean"]
    features: tuple[str, ...]
    id_map: IdMap | None
    frozen: FrozenRows | None
    side: Side | None
    """Of frozen rows."""
    storage: Literal["fp32", "fp16", "int8", "int4"]
    sharding: str
    """`auto`: the planner decides."""
    learning_rate: float | None = None
    """None: that of all tables."""


@dataclass(frozen=True)
class SideColumns:
    """The columns of `users.parquet` or `items.parquet` that are features; row k is dense id k."""

    ids: SideTable | None
    floats: dict[str, torch.Tensor]


@dataclass(frozen=True)
class FeatureSet:
    """What `resolve_features` found, the same on every rank."""

    features: list[Feature]
    tables: list[FeatureTable]
    numbers: dict[str, Numbers]
    """Of each float and bucketized feature."""
    sides: dict[Side, SideColumns]
    dim: int
    """Of tables without a dimension."""

    @property
    def keys(self) -> list[str]:
        """Features with embedding tables, in the order of the KeyedJaggedTensor."""
        return [feature.name for feature in self.features if feature.kind != "float"]

    @property
    def floats(self) -> list[str]:
        """In the order of the columns of `dense_features`."""
        return [feature.name for feature in self.features if feature.kind == "float"]

    def columns(self, log: Log) -> list[str]:
        """Columns of the log to read."""
        found = [feature.column for feature in self.features if feature.source == "log"]
        found += [log.column(side) for side in self.sides]
        return list(dict.fromkeys(found))

    def describe(self) -> dict[str, Any]:
        """JSON values, from which the features of a saved model can be built."""
        return {
            "features": {f.name: {**asdict(f.config), "column": f.column, "source": f.source} for f in self.features},
            "tables": {t.name: {"num_ids": t.num_ids, "dim": t.dim, "features": t.features} for t in self.tables},
            "numbers": {name: asdict(numbers) for name, numbers in self.numbers.items()},
        }


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
        tables = _Tables(log, features, numbers, held, maps, dim)
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


def sampled_rows(log: Log, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """These columns of row groups of train at even distances, about SAMPLED_ROWS rows."""
    groups = len(log.train.groups)
    count = max(1, min(groups, SAMPLED_ROWS * groups // log.train.num_rows))
    places = np.linspace(0, groups - 1, count).astype(int).tolist()
    for _, data in iter_row_groups(log.train, columns, sorted(set(places))):
        yield data


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


def shared_option(table: str, features: Sequence[Feature], option: str, default: Any) -> Any:
    """The value of an option of a table, which features that share it may leave at its default.

    Raises InputError if they differ.
    """
    said = {f.name: value for f in features if (value := getattr(f.config, option)) != default}
    values = list(said.values())
    if any(value != values[0] for value in values):
        each = ", ".join(f"{feature}: {value}" for feature, value in said.items())
        raise InputError(f"table '{table}': features that share it have another {option} ({each}); expected one")
    return values[0] if values else default


def vocabulary_of(log: Log, feature: Feature) -> str | None:
    """Fingerprint of the vocabulary that numbered the column, or of its hash; None if unknown."""
    if feature.source != "log":
        return None
    if (hashed := log.hash_fingerprint(feature.column)) is not None:
        return hashed
    known = (log.manifest or {}).get("features", {})
    if feature.column in known and known[feature.column].get("vocabulary"):
        return artifact.fingerprint(f"{log.root}/{known[feature.column]['vocabulary']}", log.filesystem)
    for side in SIDES:
        if feature.column == log.column(side):
            return log.vocabulary_fingerprint(side) if log.vocabulary(side) is not None else None
    return None


class _Tables:
    """Builds the tables."""

    def __init__(
        self,
        log: Log,
        features: Sequence[Feature],
        numbers: Mapping[str, Numbers],
        sides: Mapping[Side, SideColumns],
        maps: HashArtifact | None,
        dim: int,
    ) -> None:
        self.log, self.numbers, self.sides, self.maps = log, numbers, sides, maps
        self.of: dict[str, list[Feature]] = {}
        for feature in features:
            if feature.kind != "float":
                self.of.setdefault(feature.table, []).append(feature)
        folders = {f.config.frozen for f in features if f.config.frozen}
        if FACTORIZED in folders:
            raise InputError(
                f"features: frozen is '{FACTORIZED}', the factors of `recpress pipeline`; expected a folder of "
                "`recpress factorize`"
            )
        self.factors = {folder: open_factors(folder, log) for folder in folders}
        frozen_dims = [artifact.dim for artifact in self.factors.values()]
        self.dim = dim or (-(-max(frozen_dims) // 4) * 4 if frozen_dims else DIM)

    def build(self) -> list[FeatureTable]:
        if not self.of:
            raise InputError(f"{self.log.path}: no feature with an embedding table, expected at least one")
        if self.maps is not None:
            columns = {name for features in self.of.values() for f in features for name in self._map_names(f)}
            if unused := [name for name in self.maps.maps if name not in columns]:
                raise InputError(f"{self.maps.path}: a map of '{unused[0]}', which no feature looks up")
        return [self._table(name, features) for name, features in self.of.items()]

    def _table(self, name: str, features: list[Feature]) -> FeatureTable:
        def one(option: str, default: Any) -> Any:
            return shared_option(name, features, option, default)

        if "." in name:  # a table is a module, whose name has no dots
            raise InputError(
                f"table '{name}': its name has a dot; expected another name in features.'{features[0].name}'.table"
            )
        folder, side = one("frozen", None), None
        factors = self.factors[folder] if folder else None
        ids = max(self._num_ids(feature) for feature in features)
        num_ids = one("num_ids", 0) or ids
        if num_ids < ids:
            raise InputError(f"table '{name}': num_ids is {num_ids:,}, but the log has {ids:,} ids")
        self._check_vocabularies(name, features)
        if factors is not None:
            side = self._side(name, features)
            if num_ids != self.log.num_ids(side):
                raise InputError(
                    f"table '{name}': {num_ids:,} ids, but {folder} has rows for {self.log.num_ids(side):,} {side}s"
                )
        dim = one("dimension", 0) or (factors.dim if factors is not None else self.dim)
        if factors is not None and dim != factors.dim:
            raise InputError(f"table '{name}': dimension is {dim}, but the rows of {folder} have {factors.dim}")
        if factors is None and dim % 4:
            raise InputError(f"table '{name}': dimension is {dim}, expected a multiple of 4")
        return FeatureTable(
            name=name,
            num_ids=num_ids,
            dim=dim,
            pooling=one("pooling", "sum"),
            features=tuple(feature.name for feature in features),
            id_map=self._map(name, features, num_ids, one("hash", None)),
            frozen=factors,
            side=side,
            storage=one("storage", "fp32"),
            sharding=one("sharding", "auto"),
            learning_rate=one("learning_rate", None),
        )

    def _num_ids(self, feature: Feature) -> int:
        if feature.kind == "bucketized":
            return self.numbers[feature.name].num_buckets
        if feature.source != "log":
            table = self.sides[feature.source].ids
            assert table is not None
            return table.num_values()[feature.column]
        log, column = self.log, feature.column
        limit = log.train.columns[column].limit
        if limit is not None:
            return limit
        parts = [part for part in (log.train, log.val, log.test) if part is not None and column in part.columns]
        return max(largest_id(part, column)[0] for part in parts) + 1

    def _side(self, name: str, features: Sequence[Feature]) -> Side:
        for side in SIDES:
            if any(f.source == "log" and f.column == self.log.column(side) for f in features):
                return side
        raise InputError(
            f"table '{name}': frozen rows are vectors of users or items; expected a feature of column "
            f"'{self.log.schema.user}' or '{self.log.schema.item}'"
        )

    def _check_vocabularies(self, name: str, features: Sequence[Feature]) -> None:
        """Raise InputError if columns that share a table were numbered separately: an id would mean two things."""
        if len({(feature.source, feature.column) for feature in features}) == 1:
            return
        found = {feature.column: vocabulary_of(self.log, feature) for feature in features}
        numbered = {value for value in found.values() if value is not None}
        if len(numbered) > 1 or (None in found.values() and any(map(self.log.hash_fingerprint, found))):
            raise InputError(
                f"table '{name}': columns {', '.join(found)} share it, but each was numbered or hashed in a way of its "
                "own, so that an id means different things; expected one table per column, one vocabulary, or one "
                "number of ids in schema.hashed"
            )

    def _map_names(self, feature: Feature) -> list[str]:
        """Names that a map of the feature may have: of its column, or of users and items."""
        sides = [side for side in SIDES if feature.source == "log" and feature.column == self.log.column(side)]
        return [feature.column, *sides]

    def _map(self, name: str, features: Sequence[Feature], num_ids: int, given: Any) -> IdMap | None:
        learned = None
        named = {name: f for f in features for name in self._map_names(f) if self.maps and name in self.maps.maps}
        if len(named) > 1:
            raise InputError(f"table '{name}': maps of {' and '.join(named)} in --maps, expected one")
        for map_name, feature in named.items():
            assert self.maps is not None
            learned, vocabulary = self.maps.maps[map_name], vocabulary_of(self.log, feature)
            if learned.vocabulary is not None and vocabulary is not None and learned.vocabulary != vocabulary:
                raise InputError(
                    f"{self.maps.path}: the map of '{map_name}' was made for another vocabulary than that of "
                    f"{self.log.path}: the same ids mean different things"
                )
        if learned is not None:
            if given is not None:
                raise InputError(f"table '{name}': both hash and a map of --maps, expected one")
            if learned.num_ids != num_ids:
                raise InputError(f"table '{name}': its map has {learned.num_ids:,} ids, expected {num_ids:,}")
            return learned
        if given is None:
            return None
        if given.rows > num_ids:
            raise InputError(f"table '{name}': hash.rows is {given.rows:,}, but the table has {num_ids:,} ids")
        counts = None
        if given.method in ("frequency", "hybrid"):
            counts = torch.from_numpy(self._counts(features, num_ids)).float()
        try:
            return build_map(
                TableStats(name=name, num_ids=num_ids, counts=counts), given.rows, HashConfig(method=given.method)
            )
        except ValueError as error:
            raise InputError(f"table '{name}': {error}") from error

    def _counts(self, features: Sequence[Feature], num_ids: int) -> np.ndarray:
        """Rows of train per id, counted in a sample of the row groups."""
        columns = [feature.column for feature in features if feature.source == "log"]
        total = np.zeros(num_ids, dtype=np.int64)
        for data in sampled_rows(self.log, columns):
            for column in columns:
                values = data[column]
                total += np.bincount(values.values if isinstance(values, Jagged) else values, minlength=num_ids)
        return total
