"""Split one budget of rows over several tables: where a row lowers the distortion most, by ids, or with a cap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

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
    return DistortionSplit(tables, config).rows(budget)


class DistortionSplit:
    """`split_rows` for several budgets: the distortions are measured once."""

    def __init__(self, tables: Sequence[TableStats], config: HashConfig) -> None:
        self._tables = len(tables)
        self._curves = [distortions(table, config) for table in tables]
        segments = []
        for place, curve in enumerate(self._curves):
            for first, last in itertools.pairwise(_hull(*_finer(*curve))):
                segments.append(((first[1] - last[1]) / (last[0] - first[0]), place, last[0] - first[0]))
        self._steepest = sorted(segments, key=lambda segment: (-segment[0], segment[1]))

    def rows(self, budget: int) -> list[int]:
        """Rows of each table. Raises ValueError if the budget is below one row per table."""
        _check(self._tables, budget)
        rows = [1] * self._tables
        left = budget - self._tables
        for _, place, size in self._steepest:
            taken = min(size, left)
            rows[place] += taken
            left -= taken
        return rows

    def rows_within(self, size: Callable[[int, int], int], limit: int) -> list[int]:
        """Rows of each table whose sizes add up to at most `limit`, with a small distortion.

        A row may change the size of the map of its table, so sizes are not linear. The rows minimize the distortion
        plus a price per byte (Everett 1963), the lowest price that fits; what is left goes where it gains most.

        Args:
            size: (place of a table, its rows) -> bytes, with its map.

        Raises:
            ValueError: the smallest tables exceed the limit.
        """
        points = [_finer(*curve, steps=16) for curve in self._curves]
        rows = [np.array(sizes) for sizes, _ in points]
        loss = [np.array(values) for _, values in points]
        sizes = [np.array([size(place, int(k)) for k in of]) for place, of in enumerate(rows)]

        def bytes_of(chosen: list[int]) -> int:
            return sum(int(of[at]) for of, at in zip(sizes, chosen, strict=True))

        def at_price(price: float) -> list[int]:
            return [int(np.argmin(gone + price * of)) for gone, of in zip(loss, sizes, strict=True)]

        chosen = [int(np.argmin(of)) for of in sizes]
        if bytes_of(chosen) > limit:
            raise ValueError(f"does not fit: the smallest tables with their maps take {bytes_of(chosen):,} bytes")
        low, high = -60.0, 60.0  # powers of 2
        for _ in range(60):
            middle = (low + high) / 2
            found = at_price(2.0**middle)
            if bytes_of(found) <= limit:
                chosen, high = found, middle
            else:
                low = middle
        while True:
            left, best, step = limit - bytes_of(chosen), 0.0, None
            for place, at in enumerate(chosen):
                more = np.arange(at + 1, len(rows[place]))
                extra, gain = sizes[place][more] - sizes[place][at], loss[place][at] - loss[place][more]
                fits = (extra <= left) & (gain > 0)
                worth = np.where(fits, gain / np.maximum(extra, 1), 0.0)
                if fits.any() and worth.max() > best:
                    best, step = float(worth.max()), (place, int(more[worth.argmax()]))
            if step is None:
                return [int(of[at]) for of, at in zip(rows, chosen, strict=True)]
            chosen[step[0]] = step[1]


def split_by_ids(ids: Sequence[int], budget: int) -> list[int]:
    """In proportion to the ids: at least 1, at most the ids, together the budget if possible.

    Raises ValueError if the budget is below one row per table.
    """
    _check(len(ids), budget)
    rows = [1] * len(ids)
    left = min(budget, sum(ids)) - len(ids)
    total = sum(ids)
    for index, number in sorted(enumerate(ids), key=lambda pair: pair[1]):
        take = min(number - 1, left, round(left * number / total)) if total else 0
        rows[index] += take
        left, total = left - take, total - number
    for index, number in sorted(enumerate(ids), key=lambda pair: -pair[1]):  # the remainder of rounding
        take = min(left, number - rows[index])
        rows[index], left = rows[index] + take, left - take
    return rows


def split_by_cap(ids: Sequence[int], budget: int) -> list[int]:
    """All ids of small tables, and the same number of rows for the others: the largest that the budget allows.

    The rows that are left, fewer than the tables, go to the first of the others. Raises ValueError if the budget is
    below one row per table.
    """
    _check(len(ids), budget)
    low, high = 1, max(ids)
    while low < high:
        cap = (low + high + 1) // 2
        low, high = (cap, high) if sum(min(size, cap) for size in ids) <= budget else (low, cap - 1)
    rows = [min(size, low) for size in ids]
    left = budget - sum(rows)
    for place in [place for place, size in enumerate(ids) if size > low][: max(0, left)]:
        rows[place] += 1
    return rows


def _check(tables: int, budget: int) -> None:
    """Raise ValueError if a budget is below one row per table."""
    if budget < tables:
        raise ValueError(f"a budget of {budget} rows for {tables} tables, expected at least 1 row each")


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


def _finer(sizes: list[int], values: list[float], steps: int = 4) -> tuple[list[int], list[float]]:
    """Add points between positive ones, `steps` per factor of two, on the power of k that joins their neighbors."""
    points = dict(zip(sizes, values, strict=True))
    for (k, a), (m, b) in itertools.pairwise(zip(sizes, values, strict=True)):
        if b > 0 and k >= 8:  # below 8, rounding would merge points
            between = (step / steps for step in range(1, steps))
            points |= {round(k * (m / k) ** part): a * (b / a) ** part for part in between}
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
