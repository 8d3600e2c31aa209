"""Losses on user and item vectors with sampled negatives.

Layout of the B * (1 + N) items of a batch: B positives, then the negatives of row 0, of row 1, ...
"""

from __future__ import annotations

import math

import torch
from recpress.modules.config import LossConfig
from torch import nn
from torch.nn import functional as F


class PairLogits(nn.Module):
    """logit = scale * (u . v) + bias, both learned; the scale stays positive: the ranking is u . v's."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, dots: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * dots + self.bias


def split_items(users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives (B, d) and negatives (B, N, d) of items (B * (1 + N), d)."""
    rows = users.shape[0]
    return items[:rows], items[rows:].view(rows, items.shape[0] // max(rows, 1) - 1, items.shape[1])


class BinaryCrossEntropy(nn.Module):
    """Mean over all B * (1 + N) pairs of the cross-entropy of sigmoid(logit): the label, and 0 for negatives.

    The setting of CADC (Entezari Zarch et al. 2024): each sampled negative is an example of its own.
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
    ) -> torch.Tensor:
        """
        Args:
            users: (B, d). items: (B * (1 + N), d).
            label: (B,) in [0, 1], of the positives.
            log_q, item_ids: (B * (1 + N),), not used here.
        """
        positive, negative = split_items(users, items)
        for_positive = self.logits((users * positive).sum(1))
        for_negative = self.logits(torch.einsum("bd,bnd->bn", users, negative))
        # softplus(x) - y x is the cross-entropy of sigmoid(x) against y
        total = (F.softplus(for_positive) - label * for_positive).sum() + F.softplus(for_negative).sum()
        return total / max(1, items.shape[0])


class SampledSoftmax(nn.Module):
    """Mean over the rows of -log softmax of the positive among sampled items, corrected by their log q.

    The softmax's denominator over all items is estimated by
        exp(s_pos) + sum over candidates j of exp(s_j) / (count * q_j)
    with j the row's own N negatives and, with `in_batch`, the other rows' positives; `count` is how many
    candidates there are and q_j the probability with which one draw gives j (Bengio, Senecal 2008; in-batch:
    Yi et al. 2019). The positive is no draw and is not corrected; a candidate that is the row's positive item
    is left out, so that the estimate of the denominator has no bias.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.in_batch = config.in_batch
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    def forward(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        label: torch.Tensor,
        log_q: torch.Tensor,
        item_ids: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            users: (B, d). items: (B * (1 + N), d).
            label: (B,) weight of each row; the mean is over their sum.
            log_q: (B * (1 + N),) log probability of one draw of the item, for a positive that of the in-batch
                draw.
            item_ids: (B * (1 + N),).
        """
        rows = users.shape[0]
        positive, negative = split_items(users, items)
        scale = self.log_scale.exp()
        target = item_ids[:rows, None]
        for_positive = scale * (users * positive).sum(1, keepdim=True)
        scores = [scale * torch.einsum("bd,bnd->bn", users, negative) - log_q[rows:].view(rows, -1)]
        taken = [item_ids[rows:].view(rows, -1) == target]
        count = negative.shape[1]
        if self.in_batch:
            scores.append(scale * users @ positive.T - log_q[None, :rows])
            taken.append(item_ids[None, :rows] == target)  # its own row among them
            count += rows - 1
        candidates = torch.cat(scores, 1) - math.log(max(count, 1))
        candidates = candidates.masked_fill(torch.cat(taken, 1), -torch.inf)
        losses = torch.logsumexp(torch.cat([for_positive, candidates], 1), 1) - for_positive[:, 0]
        return (losses * label).sum() / label.sum().clamp(min=1e-12)


def make_loss(config: LossConfig) -> nn.Module:
    """The loss that the configuration names."""
    return {"bce": BinaryCrossEntropy, "softmax": SampledSoftmax}[config.kind](config)
