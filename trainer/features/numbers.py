"""Float features: transforms, missing values and buckets, with statistics of train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from recpress.data.stream.float_transform import FloatTransform
from recpress.trainer.features.config import FeatureConfig


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a column become a float or a bucket. `asdict` of it is JSON."""

    transform: FloatTransform = field(default_factory=FloatTransform)
    boundaries: tuple[float, ...] = ()
    """Of a `bucketized` feature; empty: a float."""

    @classmethod
    def fit(cls, config: FeatureConfig, values: np.ndarray) -> Numbers:
        """With the statistics of these values, (n,), NaN if missing."""
        known = values[np.isfinite(values)].astype(np.float64)
        if config.kind == "bucketized":
            steps = np.linspace(0, 1, config.buckets + 1)[1:-1]
            found = config.boundaries or (np.unique(np.quantile(known, steps)).tolist() if len(known) else (0.0,))
            return cls(boundaries=tuple(float(boundary) for boundary in found))
        transform = ("log1p", "standardize") if config.transform is None else config.transform
        found = FloatTransform(log1p="log1p" in transform)
        if "standardize" in transform and len(known):
            known = found(torch.from_numpy(known)).numpy()
            constant = known.min() == known.max()  # its computed deviation may be some rounding instead of 0
            found = replace(found, mean=float(known.mean()), std=1.0 if constant else float(known.std()))
        if config.missing is not None:  # given as the columns are, before the transform
            found = replace(found, missing=float(found(torch.tensor([config.missing], dtype=torch.float64))))
        return cls(found)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Numbers:
        """What `asdict` wrote."""
        return cls(FloatTransform(**values["transform"]), tuple(values["boundaries"]))

    @property
    def num_buckets(self) -> int:
        """With the one for missing numbers, which is bucket 0."""
        return len(self.boundaries) + 2

    def values(self, column: torch.Tensor) -> torch.Tensor:
        """(B,) floats, NaN or infinite if missing -> (B,) float32 without missing ones."""
        x = column.double()
        return self.transform(x.masked_fill(~torch.isfinite(x), math.nan)).float()

    def buckets(self, column: torch.Tensor) -> torch.Tensor:
        """(B,) floats -> (B,) int64 buckets."""
        x = column.double()
        found = torch.bucketize(x, torch.tensor(self.boundaries, dtype=torch.float64), right=True) + 1
        return found.masked_fill(~torch.isfinite(x), 0)
