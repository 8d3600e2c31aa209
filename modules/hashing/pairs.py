"""Two weighted rows an id: rows as the words of a dictionary, of which each id takes the two that tell most of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.hashing.clustering import CHUNK, cluster
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import Progress
from recpress.modules.hashing.shared_als import SharedRows
from recpress.modules.rows import RowSource, blocks

_TINY = 1e-12
_LEAST = 0.03
"""A row that tells less than this of a vector, by length, gets no weight: rows are solved for, and one that ids take by
next to nothing would grow without bound."""
_RIDGE = 1e-4
"""Of a pair's least squares, in units of its rows' norms: two rows that nearly agree take halves, not 1e3 and -1e3."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """rows (n, 2) int32; weights (n, 2) float16; centres (k, d) float32; history of sum_i w_i |v_i - sum_j a_ij c_j|^2,
    after each round, which never rises but for the rounding of the weights."""

    rows: torch.Tensor
    weights: torch.Tensor
    centres: torch.Tensor
    history: list[float]


def pair_rows(
    embedding: RowSource,
    weights: torch.Tensor | None,
    k: int,
    *,
    seed: int,
    iterations: int,
    name: str = "",
    progress: Progress | None = None,
) -> Pairs:
    """A dictionary of k rows and two of them for each id, so that the weighted distortion is small.

    Sparse coding with two words: rows start as the centres of weighted k-means; then, in turn, each id takes the row
    that is closest to its direction and the one closest to what is left (orthogonal matching pursuit, Pati et al.
    1993), with the two best weights, where that is better than what it has; and all rows are solved together by least
    squares (method of optimal directions, Engan et al. 1999). A row that nobody takes becomes the vector of the id
    with the largest error.

    Memory beside the source: 4 bytes (n d + 6 n + 4 k d). Time: iterations / 3 rounds of 2 n k d multiplications, so
    for tables of up to some million ids x some ten thousand rows; beyond that, take one row an id.

    Args: as `clustering.cluster`.
    """
    n, d = embedding.shape
    rounds = max(1, iterations // 3)
    first_rows = cluster(
        embedding, weights, k, seed=seed, iterations=max(1, iterations // 3), name=name, progress=progress
    )
    centres = first_rows.centres
    x = torch.empty(n, d)
    for first, block in blocks(embedding, name, (0, n), (0, d)):
        x[first : first + len(block)] = block
    w = torch.ones(n) if weights is None else weights.float()
    rows = torch.zeros(n, 2, dtype=torch.int64)
    rows[:, 1] = min(1, k - 1)
    history: list[float] = []
    for turn in range(rounds + 1):
        share, error = _match(x, rows, centres)
        if progress is not None:
            progress(f"pairs {turn}/{rounds}", n, n)
        history.append(float((error * w).sum(dtype=torch.float64)))
        if turn == rounds:
            break
        used = torch.bincount(rows.flatten()[share.flatten() != 0], minlength=k)
        spare = (used == 0).nonzero()[:, 0]
        if len(spare):
            worst = torch.topk(error * w, min(len(spare), n)).indices
            centres[spare[: len(worst)]] = x[worst]
            rows[worst, 0] = spare[: len(worst)]
            rows[worst, 1] = torch.where(rows[worst, 0] == 0, min(1, k - 1), 0)
            share[worst] = torch.tensor([1.0, 0.0])
        centres = _solve(x, w, rows, share, centres)
    rounded = share.half()
    centres = _solve(x, w, rows, rounded, centres)
    return Pairs(rows.to(torch.int32), rounded, centres, history)


def extend_pairs(
    old: IdMap, num_ids: int, embedding: RowSource, centres: torch.Tensor, *, vocabulary: str | None = None
) -> IdMap:
    """`old`, of two weighted rows an id, with the ids old.num_ids to num_ids - 1 as well; no other moves.

    An id that arrives takes the two rows that are best for its vector; one whose vector is zero its hashed rows, by
    halves.

    Args:
        embedding: (num_ids - old.num_ids, d) of the ids that arrive.
        centres: (num_rows, d), the vectors of the rows, in the space of `embedding`.

    Raises:
        ValueError: the map has other than two weighted rows an id; sizes that do not fit; a vector is not finite.
    """
    if old.ways != 2 or old.weights is None:
        raise ValueError(f"id map {old.method!r}: {old.ways} rows an id, expected two with weights")
    arriving, dim = num_ids - old.num_ids, centres.shape[1]
    if arriving < 0 or tuple(embedding.shape) != (arriving, dim) or len(centres) != old.num_rows:
        raise ValueError(
            f"id map: {num_ids} ids, an embedding of {tuple(embedding.shape)} and {len(centres)} rows; expected at "
            f"least {old.num_ids} ids, ({arriving}, {dim}) and {old.num_rows}"
        )
    rows, weights = [old.rows], [old.weights.half()]
    for first, block in blocks(embedding, old.method, (0, arriving), (0, dim)):
        pair = torch.zeros(len(block), 2, dtype=torch.int64)
        pair[:, 1] = min(1, old.num_rows - 1)
        share, _ = _match(block, pair, centres)
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
    x: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, share: torch.Tensor, centres: torch.Tensor
) -> torch.Tensor:
    """All rows by least squares, given who takes them; a row that nobody takes stays."""
    shared = SharedRows(IdMap(rows=rows.to(torch.int32), num_rows=len(centres), weights=share))
    return shared.fit(x, w, start=centres)


def _match(x: torch.Tensor, rows: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Better pairs, written into `rows` (n, 2); their weights (n, 2) and squared errors (n,)."""
    directions = centres / centres.norm(dim=1, keepdim=True).clamp_min(_TINY)
    turned = directions.T.contiguous()
    share, error = torch.empty(len(x), 2), torch.empty(len(x))
    step = max(16, CHUNK // len(centres))
    for first in range(0, len(x), step):
        part = slice(first, min(first + step, len(x)))
        v, old = x[part], rows[part]
        here = torch.arange(len(v))
        scores = v @ turned
        one = _largest(scores)
        # what is left of v has scores - (v . u) (u . u') with u the first direction
        scores -= scores[here, one][:, None] * (directions[one] @ turned)
        scores[here, one] = 0
        new = torch.stack([one, _largest(scores)], 1)
        old_share, old_error = _least_squares(v, centres[old])
        new_share, new_error = _least_squares(v, centres[new])
        better = (new_error < old_error)[:, None]
        rows[part] = torch.where(better, new, old)
        share[part] = torch.where(better, new_share, old_share)
        error[part] = torch.minimum(old_error, new_error)
    return share, error


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """Index of the largest absolute value of each row: numpy's argmax is several times as fast as torch's."""
    return torch.from_numpy(np.argmax(np.abs(scores.numpy()), axis=1))


def _least_squares(v: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (b, 2) of the two rows `pair` (b, 2, d) that are nearest to v (b, d), and the squared errors (b,)."""
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
