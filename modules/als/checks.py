"""Checks for a collapsed factorization: vectors of zero length or of one direction, interactions that score no higher
than random pairs, or a ranking no better than by popularity."""

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
"""Interactions per rank to compare with random pairs."""
_LEAST_LENGTH = 1e-3  # a shorter vector scores every pair as about zero, compared with the target of one
_LEAST_SCORE = 1e-3  # the same for the product of the lengths of a user and an item
_LEAST_SEPARATION = 0.6


_LOG = (
    "the log has too few interactions per user and item to learn preferences; collect more interactions, drop rare "
    "users and items, or rank by popularity"
)


def _fix(als: ALS) -> str:
    """How to fix a collapse: by the settings that the caller gave, else by the log."""
    config = als.config
    if getattr(config, "unobserved_weight", None) is not None or getattr(config, "regularization", None) is not None:
        return "lower regularization or raise unobserved_weight, or leave both to auto"
    given = getattr(config, "mean_penalty", None) is not None or getattr(config, "unobserved_ratio", None) is not None
    if given or not getattr(config, "auto", False):
        return "lower mean_penalty or raise unobserved_ratio, or leave them to auto"
    return _LOG


def separation(by_user: CSR, factors: Factors, exchange: Exchange, seed: int = 0) -> float:
    """Share of interactions that score above a random item of the same user; a tie counts half. Collective.

    0.5 is chance. Compares at most `PAIRS` of this rank's interactions `by_user`.
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
        found = exchange.fetch_rows(factors.items, wanted, blocks) if exchange.world > 1 else factors.items[wanted]
        return (vectors * found[torch.from_numpy(place).to(found.device)]).sum(1)

    met = scores(by_user.indices[places])
    others = scores(rng.integers(0, factors.num_items, count))
    won = ((met > others).double() + 0.5 * (met == others)).sum()
    totals = exchange.sum(torch.tensor([float(won), float(count)], dtype=torch.float64, device=exchange.device))
    return float(totals[0] / totals[1].clamp_min(1))


def effective_rank(rows: torch.Tensor, exchange: Exchange) -> float:
    """exp of the entropy of the eigenvalues of the gramian of all ranks' rows (local, d); 0 if all rows are zero."""
    gramian = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(4096):
        if not bool(part.any()):  # ids that do not occur: with large gaps between ids, most of all rows
            continue
        gramian += (part.T @ part).double()
    values = torch.linalg.eigvalsh(exchange.sum(gramian)).clamp_min(0)
    total = float(values.sum())
    if not total > 0:
        return 0.0
    share = values[values > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def check_factors(factors: Factors, als: ALS | None = None, fix: str = "train for more epochs") -> list[str]:
    """Warnings, one per sign of a collapse, each with its cause and fix. Collective; the same on every rank.

    als: the factorization that made the factors; None for another method.
    fix: how to fix a collapse of another method.
    """
    exchange = als.exchange if als is not None else Exchange(None, factors.users.device)
    fix = fix if als is None else _fix(als)
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
            f"a user's and an item's vector score at most {score:.1g} on average, the target is 1: the penalty "
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
            f"held-out examples do not rank clearly better than by popularity (NDCG@10 {choice.ndcg:.4f}, popularity "
            f"{choice.popularity:.4f}, on {choice.rows:,} examples): {_LOG}"
        )
    return found
