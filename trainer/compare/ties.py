"""Which differences between methods are significant: a paired test over the ranked users or rows, and the seeds.

The two-sided test is Student's, at 5 % for each pair; p-values are not corrected for the number of pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""A larger p-value is a tie."""
_NORMAL = 1000
"""From so many degrees of freedom, Student's distribution is taken as the normal one: p-values differ by under 1 %."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One pair of methods, by one metric."""

    first: str
    second: str
    """Keys of the methods."""
    mean: float
    """Metric of the first minus that of the second."""
    noise: float
    """Half the width of the confidence interval of `mean` at 95 %; infinite if nothing can be said."""
    p: float
    """Probability of a mean at least as far from 0 if the methods were equal."""
    level: bool
    """The difference is not significant: a tie."""

    @property
    def above(self) -> bool:
        """The first is better, significantly."""
        return self.mean > 0 and not self.level

    def reversed(self) -> Difference:
        """Second minus first."""
        return Difference(
            first=self.second, second=self.first, mean=-self.mean, noise=self.noise, p=self.p, level=self.level
        )

    def in_words(self) -> str:
        """`+0.0041 ± 0.0012, p < 0.001`."""
        noise = f" ± {self.noise:.4f}" if math.isfinite(self.noise) else ""
        return f"{self.mean:+.4f}{noise}, {format_p(self.p)}"


def paired_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """(mean, noise, p) of first - second, as in `Difference`; both a value per user (users,) for each of the same
    seeds.

    The squared standard error is that of the users, from each user's difference averaged over the seeds, plus that of
    the seeds, from each seed's mean difference (none for a single seed). The degrees of freedom are those of Welch and
    Satterthwaite, rounded down. Users without a value (NaN) are excluded. Without any noise to estimate, one user and
    one seed, only equal values are level (p 1, else 0).
    """
    values = np.stack(first).astype(np.float64) - np.stack(second).astype(np.float64)  # (seeds, users)
    values = values[:, ~np.isnan(values).any(0)]
    seeds, users = values.shape
    if not users:
        return math.nan, math.inf, 1.0
    mean = float(values.mean())
    of_users = float(values.mean(0).var(ddof=1)) / users if users > 1 else 0.0
    of_seeds = float(values.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    error = math.sqrt(of_users + of_seeds)
    if error <= 1e-12 * abs(mean) or not error:  # the same difference everywhere
        return mean, 0.0, 0.0 if mean else 1.0
    parts = [(of_users, users), (of_seeds, seeds)]
    inverse = sum((part / error**2) ** 2 / (number - 1) for part, number in parts if number > 1)
    freedom = max(1, math.floor(1 / inverse + 1e-9))
    return mean, _critical(freedom) * error, student_p(mean / error, freedom)


def auc_by_row(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A value for each row whose mean is the AUC, and whose variance over n is that of DeLong et al. (1988): (n,).

    For a positive, the AUC plus n / positives times its difference from the share of negatives below it; likewise for
    a negative. Ties count one half. So a paired test of two models over rows is DeLong's, up to n / (n - 1).

    Args:
        labels: (n,), 0 or 1, both present.
    """
    positive = labels > 0
    n, found = len(labels), np.empty(len(labels))
    auc = 0.0
    for mine in (positive, ~positive):
        others = np.sort(scores[~mine])
        below = (np.searchsorted(others, scores[mine], "left") + np.searchsorted(others, scores[mine], "right")) / 2
        won = below / len(others) if mine is positive else 1 - below / len(others)
        auc = won.mean()
        found[mine] = auc + n / len(won) * (won - auc)
    return found


def student_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t, by the finite sums for whole degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4)."""
    if freedom > _NORMAL:
        return math.erfc(abs(t) / math.sqrt(2))
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def _critical(freedom: int) -> float:
    """The t whose p-value is LEVEL, by bisection."""
    low, high = 1.0, 13.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > LEVEL else (low, middle)
    return high


def format_p(p: float) -> str:
    """`p 0.03`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def all_differences(values: Mapping[str, Sequence[np.ndarray]]) -> tuple[Difference, ...]:
    """Of all pairs of methods; `values` holds for each method an array (users,) per seed. A method with one array, such
    as popularity, has it for every seed."""
    seeds = max(map(len, values.values()), default=0)
    found = []
    for first, second in itertools.combinations(values, 2):
        pair = [[*of] * seeds if len(of) == 1 else of for of in (values[first], values[second])]
        mean, noise, p = paired_difference(*pair)
        found.append(Difference(first=first, second=second, mean=mean, noise=noise, p=p, level=p > LEVEL))
    return tuple(found)


def difference(differences: Sequence[Difference], first: str, second: str) -> Difference:
    """Of `first` minus `second`, in whichever order it was stored. Raises KeyError if there is none."""
    for one in differences:
        if (one.first, one.second) == (first, second):
            return one
        if (one.first, one.second) == (second, first):
            return one.reversed()
    raise KeyError((first, second))


def places(keys: Sequence[str], differences: Sequence[Difference]) -> dict[str, str]:
    """`1`, `2=`: one more than the number of methods that are better significantly; `=` marks a method that is level
    with another one."""
    found = {}
    for key in keys:
        pairs = [difference(differences, other, key) for other in keys if other != key]
        better = sum(pair.above for pair in pairs)
        found[key] = f"{better + 1}{'=' if any(pair.level for pair in pairs) else ''}"
    return found
