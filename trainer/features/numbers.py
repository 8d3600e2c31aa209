"""Float features: transforms, missing values and buckets, with statistics of train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recpress.trainer.features.config import FeatureConfig


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a column become a float or a bucket. JSON values only."""

    log1p: bool = False
    missing: float | None = None
    mean: float = 0.0
    deviation: float = 1.0
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
        log1p = "log1p" in transform
        if log1p:
            known = np.sign(known) * np.log1p(np.abs(known))
        if "standardize" not in transform or not len(known):
            return cls(log1p=log1p, missing=config.missing)
        constant = known.min() == known.max()  # its computed deviation may be some rounding instead of 0
        return cls(log1p, config.missing, float(known.mean()), 1.0 if constant else float(known.std()))

    @property
    def num_buckets(self) -> int:
        """With the one for missing numbers, which is bucket 0."""
        return len(self.boundaries) + 2

    def values(self, column: torch.Tensor) -> torch.Tensor:
        """(B,) floats, NaN or infinite if missing -> (B,) float32 without missing ones."""
        x = column.double()
        gone = ~torch.isfinite(x)
        if self.missing is not None:
            x = x.masked_fill(gone, self.missing)
        if self.log1p:
            x = x.sign() * x.abs().log1p()
        x = (x - self.mean) / self.deviation
        return (x if self.missing is not None else x.masked_fill(gone, 0.0)).float()

    def buckets(self, column: torch.Tensor) -> torch.Tensor:
        """(B,) floats -> (B,) int64 buckets."""
        x = column.double()
        found = torch.bucketize(x, torch.tensor(self.boundaries, dtype=torch.float64), right=True) + 1
        return found.masked_fill(~torch.isfinite(x), 0)
