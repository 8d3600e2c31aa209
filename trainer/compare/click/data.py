"""A log with labels in memory: the features of a model, and the rows of train, val and test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.datasets.utils import Batch

from recpress.data.config import Schema
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.features.resolve import open_with_features, resolve_features

HELD_OUT = 0.1
"""Share of train that is held out as test rows, and as validation rows, if the log has none: random rows."""


@dataclass(frozen=True)
class Rows:
    """The columns of one part."""

    columns: dict[str, np.ndarray | Jagged]
    labels: torch.Tensor
    """(n,) float32, 0 or 1."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Rows:
        found = {name: column.take(rows) for name, column in self.columns.items()}
        return Rows(found, self.labels[torch.from_numpy(rows)])


class ClickLog:
    """The features and rows of a log. One process, in a process group.

    Raises:
        InputError: no label, or labels of one kind in a part; a column is missing in a part; a feature has an option
            that the comparison sets itself.
    """

    def __init__(
        self,
        path: str,
        schema: Schema | None,
        features: Mapping[str, FeatureConfig],
        *,
        dim: int,
        threshold: float | None,
    ) -> None:
        for name, feature in features.items():
            for option in ("hash", "frozen", "dimension", "num_ids"):
                if getattr(feature, option):
                    raise InputError(f"features.{name}.{option}: compare hash makes the tables itself; remove it")
        self.log = open_with_features(path, schema, features, skip=False)
        label = self.log.schema.label
        if not label:
            raise InputError(f"{path}: no label; expected --schema.label, a column of 0 and 1, or of ratings")
        self.features = resolve_features(self.log, features, maps=None, dim=dim, label=label)
        self.label = label
        self.batches = FeatureBatches(self.features, self.log, label, threshold)
        self.train = self._read("train", self.log.train)
        self.test = self._held_out("test", self.log.test)
        self.val = self._held_out("val", self.log.val)
        for part in ("train", "val", "test"):
            found = getattr(self, part).labels.unique()
            if len(found) < 2:
                only = f"only the label {float(found[0]):g}" if len(found) else "no rows"
                raise InputError(f"{path}: its {part} part has {only}, expected 0 and 1 (--label-threshold)")

    def _held_out(self, part: str, rows: ParquetSplit | None) -> Rows:
        """The part, by default random rows, which leave train."""
        if rows is not None:
            return self._read(part, rows)
        held = np.random.default_rng(len(part)).random(len(self.train)) < HELD_OUT
        found, self.train = self.train.take(held.nonzero()[0]), self.train.take((~held).nonzero()[0])
        return found

    def _read(self, part: str, rows: ParquetSplit) -> Rows:
        columns = [self.label, *self.features.columns(self.log)]
        if missing := [name for name in columns if name not in rows.columns]:
            raise InputError(f"{self.log.path}: its {part} part has no column '{missing[0]}'")
        chunks = list(iter_columns(rows, columns))
        found = {name: _joined([chunk[name] for chunk in chunks]) for name in columns}
        labels = found.pop(self.label)
        assert isinstance(labels, np.ndarray)
        return Rows(found, self.batches.labels(torch.from_numpy(labels.copy())))

    def batch(self, rows: Rows, index: np.ndarray) -> Batch:
        """A batch of these rows."""
        part = rows.take(index)
        columns = {name: _tensor(column) for name, column in part.columns.items()}
        return self.batches.make(columns, part.labels)

    def in_order(self, rows: Rows, size: int) -> Iterator[Batch]:
        """All rows, in batches."""
        for first in range(0, len(rows), size):
            yield self.batch(rows, np.arange(first, min(first + size, len(rows))))

    def counts(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Table -> how often its ids occur, (num_ids,) int64."""
        found = {table.name: torch.zeros(table.num_ids, dtype=torch.int64) for table in self.features.tables}
        for batch in self.in_order(rows, 1 << 16):
            parts = batch.sparse_features.to_dict()
            for table in self.features.tables:
                for name in table.features:
                    found[table.name] += torch.bincount(parts[name].values(), minlength=table.num_ids)
        return found


def _joined(parts: list[np.ndarray | Jagged]) -> np.ndarray | Jagged:
    if isinstance(parts[0], Jagged):
        lengths = np.concatenate([part.lengths for part in parts])  # type: ignore[union-attr]
        values = np.concatenate([part.values for part in parts])  # type: ignore[union-attr]
        return Jagged(values, np.concatenate([[0], np.cumsum(lengths)]))
    return np.concatenate(parts)


def _tensor(column: np.ndarray | Jagged) -> torch.Tensor | JaggedColumn:
    if isinstance(column, Jagged):
        return JaggedColumn(torch.from_numpy(column.values), torch.from_numpy(column.lengths))
    return torch.from_numpy(column)
