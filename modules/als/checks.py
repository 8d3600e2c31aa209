"""Signs that a factorization collapsed: vectors of zero length, vectors of one direction, interactions that score no
higher than random pairs, or a ranking no better than the items' counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.als.interactions import CSR

if TYPE_CHECKING:
    from recpress.modules.als.factorization import ALS

PAIRS = 8192
"""Interactions of a rank that are compared with random pairs."""
_LEAST_LENGTH = 1e-3  # a vector this short scores every pair as zero beside the target of one
_LEAST_SCORE = 1e-3  # the same of a user and an item together
_LEAST_SEPARATION = 0.6


_LOG = (
    "the log has too few interactions per user and item to learn tastes from; collect more interactions, drop rare "
    "users and items, or rank by popularity"
)


def _fix(als: ALS) -> str:
    """What to do about a collapse: to the settings that the caller gave, else to the log."""
    config = als.config
    if getattr(config, "unobserved_weight", None) is not None or getattr(config, "regularization", None) is not None:
        return "lower regularization or raise unobserved_weight, or leave both to auto"
    given = getattr(config, "mean_penalty", None) is not None or getattr(config, "unobserved_ratio", None) is not None
    if given or not getattr(config, "auto", False):
        return "lower mean_penalty or raise unobserved_ratio, or leave them to auto"
    return _LOG


def separation(by_user: CSR, factors: Factors, exchange: Exchange, seed: int = 0) -> float:
    """Share of interactions that score above a random item for the same user, ties by half. Collective.

    0.5 is chance. `by_user`: this rank's interactions, of which at most `PAIRS` are compared.
    """
    rng = np.random.default_rng(seed)
    count = min(PAIRS, len(by_user.indices))
    places = np.sort(rng.choice(len(by_user.indices), count, replace=False)) if count else np.empty(0, np.int64)
    rows = torch.from_numpy(np.searchsorted(by_user.indptr, places, side="right") - 1)
    blocks = RowBlocks(factors.num_items, exchange.world)
    vectors = factors.users[rows.to(factors.users.device)]

    def scores(items: np.ndarray) -> torch.Tensor:
        ids, place = np.unique(items, return_inverse=True)
        wanted = torch.from_numpy(ids.astype(np.int64)).to(exchange.device)
        found = exchange.rows(factors.items, wanted, blocks) if exchange.world > 1 else factors.items[wanted]
        return (vectors * found[torch.from_numpy(place).to(found.device)]).sum(1)

    met = scores(by_user.indices[places])
    others = scores(rng.integers(0, factors.num_items, count))
    won = ((met > others).double() + 0.5 * (met == others)).sum()
    totals = exchange.sum(torch.tensor([float(won), float(count)], dtype=torch.float64, device=exchange.device))
    return float(totals[0] / totals[1].clamp_min(1))


def effective_rank(rows: torch.Tensor, exchange: Exchange) -> float:
    """exp of the entropy of the eigenvalues of rows' rows, all ranks' rows (local, d) together; 0 of zero rows."""
    gramian = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(4096):
        gramian += (part.T @ part).double()
    values = torch.linalg.eigvalsh(exchange.sum(gramian)).clamp_min(0)
    total = float(values.sum())
    if not total > 0:
        return 0.0
    share = values[values > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def check_factors(factors: Factors, als: ALS | None = None) -> list[str]:
    """Warnings, one a sign of a collapse, each with its cause and its fix. Collective; the same on every rank.

    als: what made the factors; None where another method did.
    """
    exchange = als.exchange if als is not None else Exchange(None, factors.users.device)
    fix = "lower weight_decay or train for more epochs" if als is None else _fix(als)
    found, score = [], 1.0
    for side, rows, counts in (
        ("user", factors.users, factors.user_counts),
        ("item", factors.items, factors.item_counts),
    ):
        lengths = rows.norm(dim=1)
        if counts is not None:
            lengths = lengths[counts.to(lengths.device) > 0]
        sums = [float((lengths < _LEAST_LENGTH).sum()), float(len(lengths)), float(lengths.double().sum())]
        short_count, total, length = exchange.sum(torch.tensor(sums, dtype=torch.float64, device=rows.device)).tolist()
        score *= length / max(total, 1)
        if total and short_count > 0.5 * total:
            found.append(
                f"{short_count / total:.0%} of the {side} vectors are shorter than {_LEAST_LENGTH:g}: the penalty "
                f"outweighs the interactions; {fix}"
            )
    if not found and score < _LEAST_SCORE:
        found.append(
            f"a user's and an item's vector score {score:.1g} at most on average, beside a target of 1: the penalty "
            f"outweighs the interactions; {fix}"
        )
    rank = effective_rank(factors.items, exchange)
    if not found and factors.dim >= 8 and rank < 1.5:
        found.append(
            f"the item vectors have an effective rank of {rank:.1f} in {factors.dim} dimensions: every user gets the "
            f"same ranking; {fix}"
        )
    if als is not None and not found and als.separation < _LEAST_SEPARATION:
        found.append(
            f"interactions score above random pairs in only {als.separation:.0%} of cases (50% is chance): the "
            f"factorization did not learn the log; {fix}"
        )
    choice = None if als is None else als.choice
    if choice is not None and choice.rows and not choice.above_popularity and (not found or fix == _LOG):
        found.append(
            f"held-out examples are ranked no better than by popularity (NDCG@10 {choice.ndcg:.4f}, popularity "
            f"{choice.popularity:.4f}): {_LOG}"
        )
    return found
