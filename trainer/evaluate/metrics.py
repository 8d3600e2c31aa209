"""Ranking metrics from the positions of held-out items, and the AUC of labelled scores.

A *position* is the 1-based rank of a held-out item in the ranking of its user. Ties count against the model: with b
competitors that score at least as high as the item, its position is b + 1. Held-out items of one user are ordered by
score, so that their positions differ (`positions_in_ranking`).

The held-out items of many users are passed flat: `positions` (T,) and `rows` (T,), the row of each item's user in
[0, num_users). Each metric is one value per user, (num_users,) float64, NaN for users without an item. Everything runs
on the device of its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_ahead(target: Tensor, competitors: Tensor, mask: Tensor | None = None) -> Tensor:
    """How many competitors rank ahead of each target, with ties.

    Args:
        target: scores of the held-out items, (T,).
        competitors: scores of their competitors, (T, C).
        mask: True if a competitor counts, (T, C); default: all.

    Returns:
        (T,) int64.

    Raises:
        ValueError: a score that counts is not finite.
    """
    counts = torch.ones_like(competitors, dtype=torch.bool) if mask is None else mask
    bad = ~target.isfinite() | (~competitors.isfinite() & counts).any(dim=1)
    if bad.any():
        raise ValueError(f"row {int(bad.nonzero()[0])}: a score is not finite")
    return ((competitors >= target[:, None]) & counts).sum(dim=1)


def positions_in_ranking(scores: Tensor, ahead: Tensor, rows: Tensor) -> Tensor:
    """Positions of held-out items, of which a user may have several, (T,) int64.

    Args:
        scores: scores of the held-out items, (T,).
        ahead: how many items that are not held out rank ahead of each, with ties, (T,).
        rows: row of each item's user, (T,), in any order.
    """
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(rows[by_score], stable=True)]  # by user, then by falling score
    sorted_rows = rows[order]
    first = torch.searchsorted(sorted_rows, sorted_rows, side="left")
    place = torch.arange(len(order), device=rows.device) - first
    positions = torch.empty_like(ahead)
    positions[order] = ahead[order] + place + 1
    return positions


def hit_rate(positions: Tensor, rows: Tensor, num_users: int, k: int) -> Tensor:
    """HR@K: 1 where any held-out item of the user is among the first k, else 0."""
    hits, sizes = _hits(positions, rows, num_users, k)
    return _nan_without_items((hits > 0).double(), sizes)


def recall(positions: Tensor, rows: Tensor, num_users: int, k: int) -> Tensor:
    """Recall@K: hits among the first k / min(k, number of held-out items of the user)."""
    hits, sizes = _hits(positions, rows, num_users, k)
    return _nan_without_items(hits.double() / sizes.clamp(1, k), sizes)


def uncapped_recall(positions: Tensor, rows: Tensor, num_users: int, k: int) -> Tensor:
    """UncappedRecall@K: hits among the first k / number of held-out items of the user.

    LightGCN, RecBole, Elliot, Recommenders and TorchMetrics call this Recall@K. It is at most k / that number.
    """
    hits, sizes = _hits(positions, rows, num_users, k)
    return _nan_without_items(hits.double() / sizes.clamp(min=1), sizes)


def ndcg(positions: Tensor, rows: Tensor, num_users: int, k: int) -> Tensor:
    """NDCG@K with binary relevance: DCG = sum over hits of 1 / log2(position + 1) (Järvelin & Kekäläinen
    2002).

    The ideal DCG is that of min(k, number of held-out items of the user) hits at the top.
    """
    gain = torch.where(positions <= k, 1.0 / torch.log2(positions.double() + 1.0), 0.0)
    sizes = torch.bincount(rows, minlength=num_users)
    places = torch.arange(1, k + 1, dtype=torch.float64, device=rows.device)
    ideal = torch.cumsum(1.0 / torch.log2(places + 1.0), dim=0)
    return _nan_without_items(_sum(gain, rows, num_users) / ideal[sizes.clamp(1, k) - 1], sizes)


def reciprocal_rank(positions: Tensor, rows: Tensor, num_users: int) -> Tensor:
    """1 / position of the user's first held-out item; the mean over users is MRR."""
    best = torch.full((num_users,), torch.inf, dtype=torch.float64, device=rows.device)
    best.scatter_reduce_(0, rows, positions.double(), reduce="amin")
    return _nan_without_items(1.0 / best, torch.bincount(rows, minlength=num_users))


def ranking_auc(ahead: Tensor, rows: Tensor, competitors: Tensor) -> Tensor:
    """AUC of the ranking of each user: the share of competitors that score below a held-out item, mean over the items.

    Args:
        ahead: how many competitors (items that are not held out) rank ahead of each item, ties counted, (T,).
        rows: row of each item's user, (T,).
        competitors: number of competitors of each user, (num_users,); NaN if it is 0.
    """
    num_users = len(competitors)
    sizes = torch.bincount(rows, minlength=num_users)
    share = 1.0 - _sum(ahead.double(), rows, num_users) / (sizes * competitors).clamp(min=1)
    return _nan_without_items(share, sizes * competitors)


def pointwise_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, exact, ties averaged: the Mann-Whitney statistic over positives x negatives.

    Args:
        scores: (N,), any real type.
        labels: (N,), 0 or 1.

    Raises:
        ValueError: shapes differ, a score is not finite, a label is neither 0 nor 1, or one class is missing.
    """
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)}: expected (N,) both")
    if (bad := ~scores.isfinite()).any():
        raise ValueError(f"row {int(bad.nonzero()[0])}: the score is not finite")
    if (bad := (labels != 0) & (labels != 1)).any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"row {row}: label {labels[row].item()}; expected 0 or 1")
    _, group = torch.unique(scores, return_inverse=True)  # groups of equal scores, rising
    positive = torch.bincount(group[labels == 1], minlength=int(group.max()) + 1 if len(group) else 0)
    negative = torch.bincount(group[labels == 0], minlength=len(positive))
    total = int(positive.sum()) * int(negative.sum())
    if total == 0:
        raise ValueError("AUC needs rows of both labels")
    below = torch.cumsum(negative, dim=0) - negative
    won_twice = int((positive * (2 * below + negative)).sum())  # in integers: no rounding, any order
    return won_twice / (2 * total)


def _sum(values: Tensor, rows: Tensor, num_users: int) -> Tensor:
    return torch.zeros(num_users, dtype=torch.float64, device=rows.device).index_add_(0, rows, values.double())


def _hits(positions: Tensor, rows: Tensor, num_users: int, k: int) -> tuple[Tensor, Tensor]:
    sizes = torch.bincount(rows, minlength=num_users)
    return torch.bincount(rows[positions <= k], minlength=num_users), sizes


def _nan_without_items(values: Tensor, sizes: Tensor) -> Tensor:
    return torch.where(sizes > 0, values, torch.nan)
