"""Which differences between methods are more than noise: paired over the seeds and the ranked users."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One pair of methods, by one metric."""

    first: str
    second: str
    """Keys of the methods."""
    mean: float
    """Metric of the first minus that of the second."""
    noise: float
    """Two standard errors of `mean`."""
    level: bool
    """The difference is within the noise: a tie."""


def paired_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean, two standard errors) of first - second, both a value per user (users,) for each of the same seeds.

    The standard error has two parts, which add up as squares: that of the users, from each user's difference averaged
    over the seeds, and that of the seeds, from each seed's mean difference (none for a single seed). Users without a
    value (NaN) are excluded.
    """
    values = np.stack(first).astype(np.float64) - np.stack(second).astype(np.float64)  # (seeds, users)
    values = values[:, ~np.isnan(values).any(0)]
    seeds, users = values.shape
    if not users:
        return math.nan, math.nan
    of_users = values.mean(0).var(ddof=1) / users if users > 1 else 0.0
    of_seeds = values.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    return float(values.mean()), 2.0 * math.sqrt(of_users + of_seeds)


def all_differences(values: Mapping[str, Sequence[np.ndarray]]) -> tuple[Difference, ...]:
    """Of all pairs of methods; `values` holds for each method an array (users,) per seed."""
    found = []
    for first, second in itertools.combinations(values, 2):
        mean, noise = paired_difference(values[first], values[second])
        found.append(Difference(first=first, second=second, mean=mean, noise=noise, level=abs(mean) <= noise))
    return tuple(found)


def difference(differences: Sequence[Difference], first: str, second: str) -> Difference:
    """Of `first` minus `second`, in whichever order it was stored. Raises KeyError if there is none."""
    for one in differences:
        if (one.first, one.second) == (first, second):
            return one
        if (one.first, one.second) == (second, first):
            return Difference(first=first, second=second, mean=-one.mean, noise=one.noise, level=one.level)
    raise KeyError((first, second))


def places(keys: Sequence[str], differences: Sequence[Difference]) -> dict[str, str]:
    """`1`, `2=`: one more than the number of methods that are better by more than the noise; `=` marks a method that
    is level with another one."""
    found = {}
    for key in keys:
        pairs = [difference(differences, other, key) for other in keys if other != key]
        better = sum(pair.mean > 0 and not pair.level for pair in pairs)
        found[key] = f"{better + 1}{'=' if any(pair.level for pair in pairs) else ''}"
    return found
