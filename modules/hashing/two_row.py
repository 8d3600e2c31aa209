"""Two weighted rows per id: sparse coding, with the rows of the table as dictionary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.k_means import CHUNK, k_means
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.table_stats import ProgressFn
from recpress.modules.row_source import RowSource, blocks

_TINY = 1e-12
_LEAST = 0.03
"""A row that contributes less than this share of a vector's length gets weight 0. Otherwise the solution for a row that
ids use with tiny weights would grow without bound."""
_RIDGE = 1e-4
"""Ridge of the least squares of two rows, in units of their squared norms: two nearly equal rows get weights of one
half each, not 1e3 and -1e3."""


@dataclass(frozen=True, eq=False)
class TwoRowDictionary:
    """A dictionary of rows, and two of them with weights for each id."""

    rows: torch.Tensor
    """(n, 2) int32."""
    weights: torch.Tensor
    """(n, 2) float16."""
    centers: torch.Tensor
    """(k, d) float32: the rows of the dictionary."""
    history: list[float]
    """sum_i w_i |v_i - sum_j a_ij c_j|^2 after each round. It rises by rounding of the weights only."""


def two_row_dictionary(
    embedding: RowSource,
    weights: torch.Tensor | None,
    k: int,
    *,
    seed: int,
    iterations: int,
    name: str = "",
    progress: ProgressFn | None = None,
) -> TwoRowDictionary:
    """A dictionary of k rows, and two of them with weights for each id, with a small weighted distortion.

    Rows start as the centers of weighted k-means. Then two steps alternate:
    1. Each id picks the row closest to its direction and the row closest to the residual (orthogonal matching pursuit,
       Pati et al. 1993), with the two best weights, if that is better than its current pair.
    2. Least squares solves all rows together (method of optimal directions, Engan et al. 1999). A row that no id uses
       becomes the vector of the id with the largest error.

    Memory in addition to the source: 4 bytes (n d + 6 n + 4 k d). Time: iterations / 3 rounds of 2 n k d
    multiplications, which suits tables of up to a few million ids and some ten thousand rows. Use one row per id for
    larger ones.

    Args:
        embedding, weights, k, seed, iterations, name, progress: as in `k_means.k_means`.
    """
    n, d = embedding.shape
    rounds = max(1, iterations // 3)
    first_rows = k_means(embedding, weights, k, seed=seed, iterations=rounds, name=name, progress=progress)
    centers = first_rows.centers
    x = torch.empty(n, d)
    for first, block in blocks(embedding, name, (0, n), (0, d)):
        x[first : first + len(block)] = block
    w = torch.ones(n) if weights is None else weights.float()
    rows = torch.zeros(n, 2, dtype=torch.int64)
    rows[:, 1] = min(1, k - 1)
    history: list[float] = []
    for turn in range(rounds + 1):
        share, error = _match(x, rows, centers)
        if progress is not None:
            progress(f"two-row dictionary {turn}/{rounds}", n, n)
        history.append(float((error * w).sum(dtype=torch.float64)))
        if turn == rounds:
            break
        used = torch.bincount(rows.flatten()[share.flatten() != 0], minlength=k)
        spare = (used == 0).nonzero()[:, 0]
        if len(spare):
            worst = torch.topk(error * w, min(len(spare), n)).indices
            centers[spare[: len(worst)]] = x[worst]
            rows[worst, 0] = spare[: len(worst)]
            rows[worst, 1] = torch.where(rows[worst, 0] == 0, min(1, k - 1), 0)
            share[worst] = torch.tensor([1.0, 0.0])
        centers = _solve(x, w, rows, share, centers)
    rounded = share.half()
    centers = _solve(x, w, rows, rounded, centers)
    return TwoRowDictionary(rows.to(torch.int32), rounded, centers, history)


def extend_two_row(
    old: IdMap, num_ids: int, embedding: RowSource, centers: torch.Tensor, *, vocabulary: str | None = None
) -> IdMap:
    """Add ids old.num_ids to num_ids - 1 to a map with two weighted rows per id. Other ids do not move.

    A new id gets the two rows that fit its vector best. An id with a zero vector gets its hashed rows, with weights of
    one half.

    Args:
        embedding: (num_ids - old.num_ids, d) vectors of the new ids.
        centers: (num_rows, d) vectors of the rows, in the space of `embedding`.

    Raises:
        ValueError: the map does not have two weighted rows per id; sizes do not fit; a vector is not finite.
    """
    if old.rows_per_id != 2 or old.weights is None:
        raise ValueError(f"id map {old.method!r}: {old.rows_per_id} rows per id, expected two with weights")
    num_new, dim = num_ids - old.num_ids, centers.shape[1]
    if num_new < 0 or tuple(embedding.shape) != (num_new, dim) or len(centers) != old.num_rows:
        raise ValueError(
            f"id map: {num_ids} ids, an embedding of {tuple(embedding.shape)} and {len(centers)} rows; expected at "
            f"least {old.num_ids} ids, ({num_new}, {dim}) and {old.num_rows}"
        )
    rows, weights = [old.rows], [old.weights.half()]
    for first, block in blocks(embedding, old.method, (0, num_new), (0, dim)):
        pair = torch.zeros(len(block), 2, dtype=torch.int64)
        pair[:, 1] = min(1, old.num_rows - 1)
        share, _ = _match(block, pair, centers)
        nothing = ~block.any(1)
        ids = torch.arange(first, first + len(block))[nothing] + old.num_ids
        pair[nothing], share[nothing] = old.hashed(ids).long(), 0.5
        rows.append(pair.to(torch.int32))
        weights.append(share.half())
    return IdMap(
        rows=torch.cat(rows), num_rows=old.num_rows, weights=torch.cat(weights), method=old.method,
        vocabulary=vocabulary, seed=old.seed,
    )  # fmt: skip


def _solve(
    x: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, share: torch.Tensor, centers: torch.Tensor
) -> torch.Tensor:
    """All rows by least squares, given which ids use them. A row that no id uses stays."""
    shared = MapMatrix(IdMap(rows=rows.to(torch.int32), num_rows=len(centers), weights=share))
    return shared.fit(x, w, start=centers)


def _match(x: torch.Tensor, rows: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write better pairs into `rows` (n, 2). Returns their weights (n, 2) and squared errors (n,)."""
    directions = centers / centers.norm(dim=1, keepdim=True).clamp_min(_TINY)
    turned = directions.T.contiguous()
    share, error = torch.empty(len(x), 2), torch.empty(len(x))
    step = max(16, CHUNK // len(centers))
    for first in range(0, len(x), step):
        part = slice(first, min(first + step, len(x)))
        v, old = x[part], rows[part]
        here = torch.arange(len(v))
        scores = v @ turned
        one = _largest(scores)
        # the residual of v has scores - (v . u) (u . u') with u the first direction
        scores -= scores[here, one][:, None] * (directions[one] @ turned)
        scores[here, one] = 0
        new = torch.stack([one, _largest(scores)], 1)
        old_share, old_error = _least_squares(v, centers[old])
        new_share, new_error = _least_squares(v, centers[new])
        better = (new_error < old_error)[:, None]
        rows[part] = torch.where(better, new, old)
        share[part] = torch.where(better, new_share, old_share)
        error[part] = torch.minimum(old_error, new_error)
    return share, error


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """Index of the largest absolute value of each row. numpy's argmax is several times faster than torch's."""
    return torch.from_numpy(np.argmax(np.abs(scores.numpy()), axis=1))


def _least_squares(v: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best weights (b, 2) of two rows `pair` (b, 2, d) for v (b, d), and the squared errors (b,)."""
    p, q = pair.double().unbind(1)
    target = v.double()
    pp, qq, pq = (p * p).sum(1), (q * q).sum(1), (p * q).sum(1)
    ridge = _RIDGE * (pp + qq) + _TINY
    pp, qq = pp + ridge, qq + ridge
    pv, qv = (p * target).sum(1), (q * target).sum(1)
    determinant = (pp * qq - pq * pq).clamp_min(_TINY)
    share = torch.stack([(pv * qq - qv * pq) / determinant, (qv * pp - pv * pq) / determinant], 1)
    little = share.abs() * torch.stack([pp, qq], 1).sqrt() < _LEAST * target.norm(dim=1, keepdim=True)
    alone = torch.stack([pv / pp, qv / qq], 1)
    share = torch.where(little.flip(1), alone, share).masked_fill_(little, 0.0)
    error = (target - share[:, :1] * p - share[:, 1:] * q).square().sum(1)
    return share.float(), error.float()
