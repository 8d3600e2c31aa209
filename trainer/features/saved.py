"""The features of a saved model, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from recpress.data.config import Schema
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.row_source import round_up
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.features.feature_set import Feature, FeatureSet, FeatureTable
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.features.resolve import side_columns
from recpress.trainer.features.tables import DIM, vocabulary_of


@dataclass(frozen=True)
class SavedRows:
    """In place of the factors of a frozen table: the weights of the model have its rows. All values are 0."""

    path: str
    num_ids: int
    dim: int

    def table(self, side: Side) -> np.ndarray:
        """(ids, dim), without memory."""
        return np.broadcast_to(np.float32(0), (self.num_ids, self.dim))

    def counts(self, side: Side) -> np.ndarray:
        """(ids, 1), without memory."""
        return np.broadcast_to(np.float32(0), (self.num_ids, 1))


def saved_schema(manifest: Mapping[str, Any]) -> Schema:
    """The schema that an artifact was made with; `Schema()`: that of the log's manifest."""
    saved: dict[str, Any] = manifest.get("config", {}).get("schema") or {}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return Schema(**values)


def saved_configs(path: str, manifest: Mapping[str, Any]) -> list[Feature]:
    """The features, with their columns. Raises InputError if another release wrote the manifest."""
    found = []
    try:
        for name, entry in manifest["model"]["features"].items():
            values = {part.name: entry[part.name] for part in fields(FeatureConfig)}
            values["hash"] = None if values["hash"] is None else FeatureHash(**values["hash"])
            values["transform"] = None if values["transform"] is None else tuple(values["transform"])
            values["boundaries"] = tuple(values["boundaries"])
            found.append(Feature(name, entry["column"], entry["source"], FeatureConfig(**values)))
    except (KeyError, TypeError) as error:
        raise _other_release(path, error) from error
    return found


def saved_features(
    path: str, manifest: Mapping[str, Any], log: Log, maps: Mapping[str, IdMap] | None = None
) -> FeatureSet:
    """The features that `FeatureSet.describe` described, with the side tables of `log`.

    Args:
        path: of the model, for messages.
        maps: the id maps of the model, by table; without them, tables have neither maps nor frozen rows.

    Raises:
        InputError: another release wrote the manifest; the log lacks a column, has ids without a row, or other
            vocabularies.
    """
    features = saved_configs(path, manifest)
    sides = {}
    for side in SIDES:
        table = log.features(side)
        if table is not None and (columns := side_columns(log, side, table, features)) is not None:
            sides[side] = columns
    for feature in features:
        if feature.source != "log" and feature.source not in sides:
            raise InputError(
                f"{log.path}/{feature.source}s.parquet: missing; expected it for the feature '{feature.name}'"
            )
    try:
        found = _feature_set(path, manifest, log, features, sides, maps)
        numbered = manifest["model"].get("vocabularies", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise _other_release(path, error) from error
    for feature in features:
        here = vocabulary_of(log, feature)
        if numbered.get(feature.name) not in (None, here) and here is not None:
            raise InputError(
                f"{path}: column '{feature.column}' was numbered by another vocabulary than in {log.path}: the same "
                "ids mean different things"
            )
        if feature.source != "log" and (ids := sides[feature.source].ids) is not None:
            check_ids(path, found, feature, ids.num_values().get(feature.column, 0) - 1, f"{feature.source}s.parquet")
    return found


def check_ids(path: str, features: FeatureSet, feature: Feature, largest: int, where: str) -> None:
    """Raise InputError if the largest id of a feature in `where` has no row in its table."""
    table = next((table for table in features.tables if feature.name in table.features), None)
    if table is not None and feature.kind != "bucketized" and largest >= table.num_ids:
        raise InputError(
            f"{where}, column '{feature.column}': id {largest:,}, but the table '{table.name}' of {path} has "
            f"{table.num_ids:,} ids; expected the ids that it was trained on"
        )


def _feature_set(
    path: str,
    manifest: Mapping[str, Any],
    log: Log,
    features: list[Feature],
    sides: dict[Side, Any],
    maps: Mapping[str, IdMap] | None,
) -> FeatureSet:
    model, dim = manifest["model"], int(manifest["config"]["dim"])
    numbers = {name: Numbers.of(entry) for name, entry in model["numbers"].items()}
    tables = []
    for name, entry in model["tables"].items():
        of_table = [feature.config for feature in features if feature.table == name]
        frozen = any(config.frozen for config in of_table) and maps is not None
        tables.append(
            FeatureTable(
                name=name,
                num_ids=entry["num_ids"],
                dim=entry["dim"],
                pooling="mean" if any(config.pooling == "mean" for config in of_table) else "sum",
                features=tuple(entry["features"]),
                id_map=(maps or {}).get(name),
                frozen=SavedRows(path, entry["num_ids"], entry["dim"]) if frozen else None,
                side=_side(log, features, name) if frozen else None,
                storage=next((config.storage for config in of_table if config.storage != "fp32"), "fp32")
                if frozen
                else "fp32",
                sharding="auto",
            )
        )
    with_factors = {feature.table for feature in features if feature.config.frozen}
    dims = [table.dim for table in tables if table.name in with_factors]
    return FeatureSet(features, tables, numbers, sides, dim or (round_up(max(dims)) if dims else DIM))


def _side(log: Log, features: list[Feature], table: str) -> Side:
    columns = {feature.column for feature in features if feature.table == table and feature.source == "log"}
    return next((side for side in SIDES if log.column(side) in columns), "user")


def _other_release(path: str, error: Exception) -> InputError:
    return InputError(f"{path}: its manifest does not describe a model of this release: {error}")
