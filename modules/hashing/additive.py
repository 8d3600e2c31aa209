"""Two rows per id without weights: the sum of a row of the first and a row of the second half of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.k_means import CHUNK, k_means, nearest
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.table_stats import ProgressFn
from recpress.modules.row_source import RowSource, blocks

_BEAM = 8
"""Nearest rows of the first half for which the best row of the second half is searched."""


@dataclass(frozen=True, eq=False)
class AdditiveRows:
    """A table of rows, and two of them for each id."""

    rows: torch.Tensor
    """(n, 2) int32: one in [0, ceil(k / 2)), one in [ceil(k / 2), k)."""
    centers: torch.Tensor
    """(k, d) float32."""
    history: list[float]
    """sum_i w_i |v_i - c_p(i) - c_q(i)|^2 after each round. It does not rise but for rounding."""


def additive_rows(
    embedding: RowSource,
    weights: torch.Tensor | None,
    k: int,
    *,
    seed: int,
    iterations: int,
    name: str = "",
    progress: ProgressFn | None = None,
) -> AdditiveRows:
    """Rows and pairs with a small weighted distortion (additive quantization, Babenko and Lempitsky 2014).

    The halves start as the centers of weighted k-means of the vectors, and of their residuals. Then two steps
    alternate: least squares solves all rows together, and each id picks its best pair, if that is better than its
    current one, among those of its nearest rows of the first half.

    Memory in addition to the source: 4 bytes (n d + 6 n + 4 k d). Time: iterations / 3 rounds of about 4 n k d
    multiplications.

    Args:
        embedding, weights, k, seed, iterations, name, progress: as in `k_means.k_means`.

    Raises:
        ValueError: as `k_means`.
    """
    n, d = embedding.shape
    rounds, half = max(1, iterations // 3), -(-k // 2)
    x = torch.empty(n, d)
    for first, block in blocks(embedding, name, (0, n), (0, d)):
        x[first : first + len(block)] = block
    w = torch.ones(n) if weights is None else weights.float()
    one = k_means(x, w, half, seed=seed, iterations=rounds, name=name, progress=progress)
    if k == 1:  # twice this row
        return AdditiveRows(torch.zeros(n, 2, dtype=torch.int32), one.centers / 2, one.history)
    residual = x - one.centers[one.assignment.long()]
    two = k_means(residual, w, k - half, seed=seed + 1, iterations=rounds, name=name, progress=progress)
    centers = torch.cat([one.centers, two.centers])
    rows = torch.stack([one.assignment, two.assignment + half], 1)
    history: list[float] = []
    for turn in range(rounds + 1):
        centers = MapMatrix(IdMap(rows=rows, num_rows=k)).fit(x, w, start=centers)
        rows, error = _match(x, rows, centers, half)
        history.append(float((error * w).sum(dtype=torch.float64)))
        if progress is not None:
            progress(f"sums of two rows {turn}/{rounds}", n, n)
    return AdditiveRows(rows, centers, history)


def _match(x: torch.Tensor, rows: torch.Tensor, centers: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (n, 2) that are at least as good as `rows`, and their squared errors (n,)."""
    first, second = centers[:half], centers[half:]
    found, error = rows.clone(), torch.empty(len(x))
    lengths, beam = first.square().sum(1) / 2, min(_BEAM, half)
    step = max(16, CHUNK // half)
    for start in range(0, len(x), step):
        part = slice(start, min(start + step, len(x)))
        v = x[part]
        near = torch.topk(v @ first.T - lengths, beam, dim=1).indices
        residual = v[:, None] - first[near]  # (b, beam, d)
        last = nearest(residual.flatten(0, 1), second).view(len(v), beam)
        errors = (residual - second[last]).square().sum(2)
        best = errors.argmin(1, keepdim=True)
        new = torch.cat([near.gather(1, best), half + last.gather(1, best)], 1).int()
        old = (v - centers[rows[part].long()].sum(1)).square().sum(1)
        better = errors.gather(1, best)[:, 0] < old
        found[part] = torch.where(better[:, None], new, rows[part])
        error[part] = torch.where(better, errors.gather(1, best)[:, 0], old)
    return found, error
