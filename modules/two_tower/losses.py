"""Losses on user and item vectors with sampled negatives.

Layout of the items of a batch: B positives, then the negatives. Either each example has its own N negatives, B * N in
total, those of example 0 first; or all examples share N negatives, and `excluded` (B, N) marks those that are not
negatives of an example.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from recpress.modules.config import LossConfig
from recpress.modules.two_tower.predictions import ObservedLoss


class PairLogits(nn.Module):
    """logit = scale * (u . v) + bias, both learned. The scale is positive, so the ranking is that of u . v."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, dots: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * dots + self.bias


def pair_scores(
    users: torch.Tensor, items: torch.Tensor, shared: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dot products with the positive (B,) and with each negative (B, N), and the vectors of the positives (B, d)."""
    rows = users.shape[0]
    # the backward pass of split copies once, that of slices four times
    positives, negatives = items.split([rows, items.shape[0] - rows])
    if shared:
        of_negatives = users @ negatives.T
    else:
        own = negatives.view(rows, items.shape[0] // max(rows, 1) - 1, items.shape[1])
        of_negatives = (users[:, None] * own).sum(2)
    return (users * positives).sum(1), of_negatives, positives


class BinaryCrossEntropy(ObservedLoss):
    """Mean over all pairs of the cross-entropy of sigmoid(logit), with the label of positives and 0 for negatives.

    As in CADC (Entezari Zarch et al. 2024), each sampled negative is a separate example.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.logits = PairLogits(config.scale, config.bias)

    def forward(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        label: torch.Tensor,
        log_q: torch.Tensor,
        item_ids: torch.Tensor,
        excluded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            users: (B, d). items: (B + negatives, d).
            label: (B,) in [0, 1], of the positives.
            log_q, item_ids: not used here.
            excluded: (B, N) if the negatives are shared.
        """
        positive, negative, _ = pair_scores(users, items, excluded is not None)
        for_positive, for_negative = self.logits(positive), self.logits(negative)
        if self.observes(positive):
            self.observe_pairs(for_positive, for_negative, label, excluded)
        losses = F.softplus(for_negative)
        pairs: int | torch.Tensor = positive.numel() + negative.numel()
        if excluded is not None:
            losses = losses.masked_fill(excluded, 0.0)
            pairs = pairs - excluded.sum()
        # softplus(x) - y x is the cross-entropy of sigmoid(x) against y
        total = (F.softplus(for_positive) - label * for_positive).sum() + losses.sum()
        return total / pairs


class SampledSoftmax(ObservedLoss):
    """Mean over the examples of -log softmax of the positive among sampled items, with logQ correction.

    The estimate of the softmax's denominator over all items is
        exp(s_pos) + sum over candidates j of exp(s_j) / (count * q_j)
    Candidates are the negatives of the example and, with `in_batch`, the positives of the other examples. `count` is
    the number of draws, and q_j the probability that one draw gives j (Bengio, Senecal 2008; in-batch: Yi et al. 2019).
    The positive is not drawn, so it is not corrected. A candidate equal to the positive item, or `excluded`, is
    skipped, so that the estimate is unbiased. `config.candidates` scales the sum over the negatives to that number of
    candidates.
    """

    calibrated = False

    def __init__(self, config: LossConfig, num_items: int) -> None:
        super().__init__()
        self.in_batch = config.in_batch
        self.offset = math.log((config.candidates - 1) / num_items) if config.candidates > 1 else 0.0
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    def forward(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        label: torch.Tensor,
        log_q: torch.Tensor,
        item_ids: torch.Tensor,
        excluded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            users: (B, d). items: (B + negatives, d).
            label: (B,) weight of each example. The mean divides by their sum.
            log_q: (items,) log probability that one draw gives the item; for a positive, that of the in-batch draw.
            item_ids: (items,).
            excluded: (B, N) if the negatives are shared.
        """
        rows = users.shape[0]
        positive, negative, of_positives = pair_scores(users, items, excluded is not None)
        scale, target = self.log_scale.exp(), item_ids[:rows, None]
        per_row = (1, -1) if excluded is not None else (rows, -1)
        log_qs = [log_q[rows:].view(per_row)]
        scores = [scale * negative - log_qs[0]]
        taken = [item_ids[rows:].view(per_row) == target]
        if excluded is not None:
            taken[0] = taken[0] | excluded
        count = negative.shape[1]
        if self.in_batch:
            log_qs.append(log_q[None, :rows])
            scores.append(scale * users @ of_positives.T - log_qs[1])
            taken.append(item_ids[None, :rows] == target)  # its own row among them
            count += rows - 1
        offset = self.offset - math.log(max(count, 1))
        candidates = torch.cat(scores, 1) + offset
        candidates = candidates.masked_fill(torch.cat(taken, 1), -torch.inf)
        for_positive = scale * positive
        total = torch.logsumexp(torch.cat([for_positive[:, None], candidates], 1), 1)
        if self.observes(positive):
            correction = offset - torch.cat([each.expand(log_qs[0].shape[0], -1) for each in log_qs], 1)
            self.observe_choice(for_positive, candidates, correction, total, label)
        losses = total - for_positive
        return (losses * label).sum() / label.sum().clamp(min=1e-12)


def make_loss(config: LossConfig, num_items: int) -> ObservedLoss:
    """The loss of a configuration."""
    return BinaryCrossEntropy(config) if config.kind == "bce" else SampledSoftmax(config, num_items)
