"""Split one budget of rows over several tables: each row goes where it lowers the distortion most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.k_means import lloyd
from recpress.modules.hashing.table_stats import TableStats, require_counts, require_embedding
from recpress.modules.row_source import gather_rows

SAMPLE = 1 << 14
"""Most ids of a table on which to measure its distortion."""
MEASURED = 512
"""Most rows for which to measure the distortion. It is extrapolated beyond that."""
ITERATIONS = 5


def split_rows(tables: Sequence[TableStats], budget: int, config: HashConfig) -> list[int]:
    """Rows of each table: at least 1, at most its ids, `budget` in total (or all ids, if there are fewer).

    Minimizes  sum_t D_t(k_t)  with  D_t(k) = sum_i w_i |v_i - c_a(i)|^2  the least distortion of table t with k rows,
    and w_i = count_i ** config.count_exponent. So the embeddings must have comparable units: those of `warm_up`, or the
    two sides of one factorization, scaled to the same curvature.

    k-means measures D_t at k = 1, 2, 4, ...; beyond, D_t follows the power of k between the last two measurements
    (-2 / d for smooth densities, Zador 1982). Segments of the lower convex hulls of all D_t get their rows in order of
    slope, steepest first. For convex curves that is optimal (Fox 1966).

    Raises:
        ValueError: the budget is below one row per table; a table has no counts or no embedding.
    """
    if budget < len(tables):
        raise ValueError(f"a budget of {budget} rows for {len(tables)} tables, expected at least 1 row each")
    segments = []
    for place, table in enumerate(tables):
        hull = _hull(*_finer(*distortions(table, config)))
        for first, last in itertools.pairwise(hull):
            segments.append(((first[1] - last[1]) / (last[0] - first[0]), place, last[0] - first[0]))
    rows = [1] * len(tables)
    left = budget - len(tables)
    for _, place, size in sorted(segments, key=lambda segment: (-segment[0], segment[1])):
        taken = min(size, left)
        rows[place] += taken
        left -= taken
    return rows


def distortions(table: TableStats, config: HashConfig) -> tuple[list[int], list[float]]:
    """Ascending numbers of rows from 1 to all ids, and the distortion of the table with each.

    Measured on at most `SAMPLE` ids: half of them have the largest weights, the others are evenly spaced and represent
    the rest.
    """
    n = table.num_ids
    weights = require_counts(table, "split").double() ** config.count_exponent
    chosen = torch.arange(n)
    if n > SAMPLE:
        chosen = torch.topk(weights, SAMPLE // 2).indices
        rest = torch.ones(n, dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero()[:, 0]
        drawn = others[torch.linspace(0, len(others) - 1, SAMPLE - len(chosen)).long()]
        share = weights[others].sum() / weights[drawn].sum().clamp_min(1e-300)
        weights = torch.cat([weights[chosen], weights[drawn] * share])
        chosen = torch.cat([chosen, drawn])
        order = torch.sort(chosen).indices
        chosen, weights = chosen[order], weights[order]
    x = _vectors(table, chosen)
    mean = float(weights.mean())
    if n == 1 or mean == 0:
        return sorted({1, n}), [0.0] * len({1, n})
    w = (weights / mean).clamp_min(1e-6).float()  # lloyd needs weights above 0
    sizes, found = [], []
    rows = 1
    while rows <= min(MEASURED, max(1, len(chosen) // 2)):
        sizes.append(rows)
        found.append(mean * lloyd(x, w, rows, seed=config.seed, iterations=ITERATIONS).distortion)
        rows *= 2
    slope = np.log2(found[-2] / found[-1]) if len(found) > 1 and found[-1] > 0 else 0.0
    while rows < n:
        sizes.append(rows)
        found.append(found[-1] * 2.0 ** -max(slope, 0.0))
        rows *= 2
    return [*sizes, n], [*found, 0.0]


def _vectors(table: TableStats, ids: torch.Tensor) -> torch.Tensor:
    """Vectors of ascending ids: (len(ids), d) float32."""
    x = gather_rows(require_embedding(table, "split"), ids)
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        bad = int(ids[~finite][0])
        raise ValueError(f"table {table.name!r}: row {bad} of the embedding holds NaN or infinity")
    return x


def _finer(sizes: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Add points between positive ones, at most a fifth of k apart, on the power of k that joins their neighbors."""
    points = dict(zip(sizes, values, strict=True))
    for (k, a), (m, b) in itertools.pairwise(zip(sizes, values, strict=True)):
        if b > 0 and k >= 8:  # below 8, rounding would merge points
            points |= {round(k * (m / k) ** (step / 4)): a * (b / a) ** (step / 4) for step in range(1, 4)}
    rising = sorted(points)
    return rising, [points[size] for size in rising]


def _hull(sizes: list[int], values: list[float]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of a curve, in order."""
    corners: list[tuple[int, float]] = []
    for point in zip(sizes, values, strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
