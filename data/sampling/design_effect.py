"""What block sampling does to an estimate: its design effect, measured on a log.

The mean of a column over a sample of n rows has variance (1 - rate) S^2 / n where single rows are drawn, and *design
effect* times that where whole row groups of m rows are. The design effect is 1 + (m - 1) rho, with rho the intra-class
correlation of the column in row groups (Kish 1965, "Survey Sampling", 5.4): about 1 on a shuffled log, up to m where
row groups differ and the rows of each are alike, as in a log in the order of time or of users. A sample of n rows by
blocks says as much as n / (design effect) single rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recpress.data.dataset.parquet_split import ParquetSplit


@dataclass(frozen=True)
class DesignEffect:
    """Of the mean of one column."""

    effect: float
    """Variance by block sampling over variance by rows, for samples of the same size."""
    correlation: float
    """Intra-class correlation rho = (effect - 1) / (m - 1), m the mean number of rows of a row group."""
    groups: int
    """Row groups that it was measured on; chance alone moves the effect of a shuffled log by sqrt(2 / groups)."""


def design_effects(
    rows: ParquetSplit, columns: Sequence[str], groups: Sequence[int] | None = None
) -> dict[str, DesignEffect]:
    """The design effect of each of the columns (scalar ones), from all row groups or those that are named by place.

    Reads the columns once. A column that is constant has effect 1; rows with NaN are skipped.

    Raises:
        ValueError: fewer than two row groups.
        InputError: what reading raises.
    """
    places = range(len(rows.groups)) if groups is None else groups
    if len(places) < 2:
        raise ValueError(f"{len(places)} row groups: expected at least two")
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in columns}
    origin: dict[str, float] = {}
    for place in places:
        for name, values in rows.read(rows.groups[place], columns).items():
            assert isinstance(values, np.ndarray)
            numbers = values.astype(np.float64)
            numbers = numbers[~np.isnan(numbers)]
            numbers -= origin.setdefault(name, float(numbers[0]) if len(numbers) else 0.0)  # squares stay exact enough
            found[name].append((len(numbers), float(numbers.sum()), float(numbers @ numbers)))
    return {name: _effect(*np.array(sums).T) for name, sums in found.items()}


def _effect(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> DesignEffect:
    total, groups = counts.sum(), len(counts)
    size, mean = total / groups, sums.sum() / max(total, 1)
    variance = (squares.sum() - total * mean**2) / max(total - 1, 1)
    between = (((sums - counts * mean) / size) ** 2).sum() / (groups - 1) if size else 0.0
    effect = size * between / variance if variance > 0 else 1.0
    return DesignEffect(float(effect), float((effect - 1) / (size - 1)) if size > 1 else 0.0, groups)
