"""Transforms of float columns before the batch is built."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups
from recpress.data.errors import InputError


@dataclass(frozen=True)
class FloatTransform:
    """Logarithm, then standardization, then the value for missing ones, of one float column.

    Example:
        >>> FloatTransform(log1p=True, missing=-1.0)(torch.tensor([0.0, float("nan")]))
        tensor([ 0., -1.])
    """

    log1p: bool = False
    """sign(x) log(1 + |x|): for counts the usual log1p, and defined for negative values."""
    mean: float = 0.0
    """Subtracted after the logarithm."""
    std: float = 1.0
    """Divides after the logarithm; above 0."""
    missing: float = 0.0
    """Stands for a missing value after both, so that 0 is the mean of a standardized column."""

    def __post_init__(self) -> None:
        if not (np.isfinite([self.mean, self.std, self.missing]).all() and self.std > 0):
            raise InputError(
                f"float transform: mean is {self.mean}, std {self.std}, missing {self.missing}; "
                "expected finite numbers and a std above 0"
            )

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(B,) float32, NaN if missing -> (B,) float32 without NaN."""
        if self.log1p:
            values = values.sign() * values.abs().log1p()
        values = (values - self.mean) / self.std
        return values.masked_fill(values.isnan(), self.missing)


def standardize(
    rows: ParquetSplit, names: Sequence[str], *, log1p: Collection[str] = (), missing: float = 0.0
) -> dict[str, FloatTransform]:
    """Transforms by which these columns have mean 0 and standard deviation 1 over the rows, without missing values.

    Reads the columns once. A column without two different values is only shifted: its std is 1.

    Args:
        rows: usually `Log.train`.
        log1p: those of the columns whose logarithm is standardized.
        missing: see `FloatTransform`.

    Raises:
        InputError: an unknown column, a column without any value, or what reading raises.
    """
    for name in (*names, *log1p):
        if name not in rows.columns or (name in log1p and name not in names):
            raise InputError(f"standardize: no column '{name}'; expected some of {', '.join(rows.columns)}")
    count, mean, squares = (dict.fromkeys(names, 0.0) for _ in range(3))
    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    for _, data in iter_row_groups(rows, list(names)):
        for name in names:
            values = np.asarray(data[name], dtype=np.float64)
            values = values[~np.isnan(values)]
            if name in log1p:
                values = np.sign(values) * np.log1p(np.abs(values))
            if not len(values):
                continue
            total, shift = count[name] + len(values), float(values.mean()) - mean[name]  # merged as by Chan et al.
            squares[name] += float(values.var()) * len(values) + shift**2 * count[name] * len(values) / total
            mean[name] += shift * len(values) / total
            count[name] = total
            low[name], high[name] = min(low[name], values.min()), max(high[name], values.max())
    for name in names:
        if not count[name]:
            raise InputError(f"{rows.files[0].path}, column '{name}': no value in any row group; expected at least one")
    return {
        name: FloatTransform(
            log1p=name in log1p,
            mean=mean[name],
            # The variance of equal values is not exactly 0.
            std=(float(np.sqrt(squares[name] / count[name])) if low[name] < high[name] else 0.0) or 1.0,
            missing=missing,
        )
        for name in names
    }
