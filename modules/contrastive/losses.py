"""Losses of a contrastive factorization, with their gradients in closed form.

All losses see cosines: of each positive pair, and of each user with the negatives that a batch shares. With the
weight w_ui of a positive, m items and negatives j that are drawn n times with probabilities pi_j, an estimated sum over
all items has a term 1 / (n pi_j) per negative. Per user u:

    softmax   sum_i w_ui [ -s_ui / t + log( exp(s_ui / t) + sum_j exp(s_uj / t) / (n pi_j) ) ]
    ccl       sum_i w_ui [ 1 - s_ui + mu / m sum_j max(0, s_uj - margin) / (n pi_j) ]
    logistic  sum_i w_ui [ log(1 + exp(-s_ui / t)) + mu / m sum_j log(1 + exp(s_uj / t)) / (n pi_j) ]

`softmax` corrects the sampled softmax by logQ (Bengio and Senecal 2008), `ccl` is the cosine contrastive loss of
SimpleX (Mao et al. 2021), `logistic` the weighted cross-entropy of UltraGCN without its graph terms (Mao et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from recpress.modules.config import ContrastiveConfig


@dataclass
class Scores:
    """Cosines of a batch of B users with P positives and n negatives."""

    positive: torch.Tensor
    """(P,)."""
    negative: torch.Tensor
    """(B, n). A loss may overwrite it."""
    row: torch.Tensor
    """User of each positive, as a row of `negative`, (P,) int64."""
    weight: torch.Tensor
    """Weight of each positive, (P,)."""
    row_weight: torch.Tensor
    """Sum of the weights of each user's positives, (B,)."""
    log_expected: torch.Tensor
    """log(n pi_j): expected number of draws of each negative, (n,)."""
    num_items: int
    """Number of items that can be drawn."""


Loss = Callable[[Scores], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Sum of the loss, (), and its gradients by the positive cosines, (P,), and by the negative cosines, (B, n)."""


def softmax_loss(scores: Scores, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sampled softmax over one positive and all negatives."""
    logits = scores.negative.mul_(1 / temperature).sub_(scores.log_expected)
    top = logits.amax(1, keepdim=True)
    share = logits.sub_(top).exp_()
    total = share.sum(1, keepdim=True)
    others = total.log().add_(top).squeeze(1)
    gap = others.index_select(0, scores.row) - scores.positive * (1 / temperature)
    # the probability that the softmax does not give to the positive
    missed = torch.sigmoid(gap).mul_(scores.weight).mul_(1 / temperature)
    of_row = torch.zeros_like(others).index_add_(0, scores.row, missed)
    loss = (F.softplus(gap) * scores.weight).sum()
    return loss, missed.neg_(), share.mul_(of_row.unsqueeze(1) / total)


def ccl_loss(scores: Scores, margin: float, negative_weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cosine contrastive loss."""
    each = (scores.row_weight * (negative_weight / scores.num_items)).unsqueeze(1) * torch.exp(-scores.log_expected)
    above = scores.negative.sub_(margin)
    loss = ((1 - scores.positive) * scores.weight).sum() + (above.clamp(min=0) * each).sum()
    return loss, -scores.weight, each.mul_(above > 0)


def logistic_loss(
    scores: Scores, temperature: float, negative_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of every pair."""
    each = (scores.row_weight * (negative_weight / scores.num_items)).unsqueeze(1) * torch.exp(-scores.log_expected)
    positive, negative = scores.positive * (1 / temperature), scores.negative.mul_(1 / temperature)
    loss = (F.softplus(-positive) * scores.weight).sum() + (F.softplus(negative) * each).sum()
    missed = torch.sigmoid(-positive).mul_(scores.weight).mul_(-1 / temperature)
    return loss, missed, negative.sigmoid_().mul_(each).mul_(1 / temperature)


def make_loss(config: ContrastiveConfig) -> Loss:
    """The loss that the config names. Its temperature must be given."""
    assert config.temperature is not None
    if config.loss == "ccl":
        return partial(ccl_loss, margin=config.margin, negative_weight=config.negative_weight)
    if config.loss == "logistic":
        return partial(logistic_loss, temperature=config.temperature, negative_weight=config.negative_weight)
    return partial(softmax_loss, temperature=config.temperature)
