"""Batches of features: rows of a log -> TorchRec's `Batch` with `dense_features`, `sparse_features` and `labels`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchrec.datasets.utils import Batch

from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.data.stream.keyed_features import KeyedFeatures
from recpress.data.stream.loader import Interactions
from recpress.trainer.features.feature_set import Feature, FeatureSet

Columns = Mapping[str, torch.Tensor | JaggedColumn]
"""Name -> ids (B,) int64, numbers (B,), or lists of ids."""


class FeatureBatches:
    """Builds batches: `map(FeatureBatches(...), stream)`.

    `sparse_features` has a key per feature with a table, stride B; `dense_features` is (B, floats) float32; `labels` is
    (B,) float32, 0 or 1.

    Args:
        label: column of the labels.
        threshold: labels from here on are 1, others 0; None: labels must be 0 or 1.
        pin_memory: page-locked results, from which CUDA copies during the computation.
    """

    def __init__(
        self, features: FeatureSet, log: Log, label: str, threshold: float | None = None, *, pin_memory: bool = False
    ) -> None:
        self.features, self.label, self.threshold, self.pin_memory = features, label, threshold, pin_memory
        self._keyed = [feature for feature in features.features if feature.kind != "float"]
        self._floats = [feature for feature in features.features if feature.kind == "float"]
        self._id_of: dict[Side, str] = {side: log.column(side) for side in SIDES}
        self._where = log.path
        self._keyed_features = KeyedFeatures()

    def __call__(self, rows: Interactions) -> Batch:
        columns: dict[str, torch.Tensor | JaggedColumn] = dict(rows.categorical)
        for names, values in rows.tables:
            columns |= dict(zip(names, values, strict=True))
        assert rows.label is not None
        return self.make(columns, rows.label)

    def make(self, columns: Columns, label: torch.Tensor) -> Batch:
        """A batch of these columns. Raises InputError if a label is not 0 or 1."""
        keyed = {feature.name: self._column(feature, columns) for feature in self._keyed}
        features = self._keyed_features(keyed, len(label))
        floats = [self._column(feature, columns) for feature in self._floats]
        dense = torch.stack(floats, 1) if floats else torch.zeros(len(label), 0)  # type: ignore[arg-type]
        batch = Batch(dense_features=dense, sparse_features=features, labels=self.labels(label))
        return batch.pin_memory() if self.pin_memory else batch

    def filler(self, size: int) -> Batch:
        """A batch of ids 0, empty lists and labels 0."""
        zeros = torch.zeros(size, dtype=torch.int64)
        columns: dict[str, torch.Tensor | JaggedColumn] = dict.fromkeys(self._id_of.values(), zeros)
        for feature in self.features.features:
            if feature.source == "log":
                listed = feature.kind in ("list", "sequence")
                columns[feature.column] = JaggedColumn(zeros[:0], zeros) if listed else zeros
        return self.make(columns, torch.zeros(size))

    def labels(self, label: torch.Tensor) -> torch.Tensor:
        """Labels of 0 and 1, (B,) float32."""
        if self.threshold is not None:
            return (label >= self.threshold).float()
        label = label.float()
        if len(bad := label[(label != 0) & (label != 1)]):
            raise InputError(
                f"{self._where}, column '{self.label}': label {float(bad[0]):g}, expected 0 or 1; --label-threshold "
                "makes labels of ratings"
            )
        return label

    def _column(self, feature: Feature, columns: Columns) -> torch.Tensor | JaggedColumn:
        values = self._values(feature, columns)
        if isinstance(values, JaggedColumn):
            return _last(values, feature.config.max_length) if feature.kind == "sequence" else values
        if feature.kind == "float":
            return self.features.numbers[feature.name].values(values)
        if feature.kind == "bucketized":
            return self.features.numbers[feature.name].buckets(values)
        return values.long()

    def _values(self, feature: Feature, columns: Columns) -> torch.Tensor | JaggedColumn:
        if feature.source == "log":
            return columns[feature.column]
        side, ids = self.features.sides[feature.source], columns[self._id_of[feature.source]]
        assert isinstance(ids, torch.Tensor)
        if feature.column in side.floats:
            return side.floats[feature.column][ids]
        assert side.ids is not None
        return side.ids.gather_one(feature.column, ids)


def _last(lists: JaggedColumn, most: int) -> JaggedColumn:
    """The last `most` values of each list."""
    ends = lists.lengths.cumsum(0)
    from_end = ends.repeat_interleave(lists.lengths) - torch.arange(len(lists.values))
    return JaggedColumn(lists.values[from_end <= most], lists.lengths.clamp(max=most))
