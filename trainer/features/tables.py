"""Builds the embedding tables of features: their ids, maps and frozen rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.parquet_split import largest_id
from recpress.data.errors import InputError
from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.artifacts.id_maps import HashArtifact
from recpress.trainer.features.config import FACTORIZED
from recpress.trainer.features.feature_set import Feature, FeatureTable, SideColumns
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.features.sampled_rows import sampled_rows

DIM = 16
"""Dimension of tables by default."""


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


class TableBuilder:
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
