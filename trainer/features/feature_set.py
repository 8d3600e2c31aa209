"""The features of a run: their columns, and the embedding tables with their ids, maps and rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch

from recpress.data.dataset.log import Log, Side
from recpress.data.dataset.side_table import SideTable
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.features.config import FeatureConfig, Kind
from recpress.trainer.features.numbers import Numbers

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
