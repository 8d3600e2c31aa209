"""What a loss predicts of the pairs of a batch, for metrics that watch the training: NE, AUC, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Predictions:
    """P pairs of a user and an item, none with a gradient."""

    probability: torch.Tensor
    """That the pair is a positive. (P,)"""
    label: torch.Tensor  # (P,) in [0, 1]
    weight: torch.Tensor
    """How many pairs of the loss this one stands for; 0: none. (P,)"""


class WatchedLoss(nn.Module):
    """A loss that tells `watcher`, where there is one, what it predicts of the positives and of `watched` negatives of
    each row (0: all); the weight of a negative makes up for those that are not told."""

    def __init__(self) -> None:
        super().__init__()
        self.watcher: Callable[[Predictions], None] | None = None
        self.watched = 0

    def told(self, scores: torch.Tensor) -> bool:
        """Whether there is somebody to tell; nobody is told while a train pipeline traces the model."""
        return self.watcher is not None and not isinstance(scores, torch.fx.Proxy)

    @torch.no_grad()
    def tell_pairs(
        self, positive: torch.Tensor, negative: torch.Tensor, label: torch.Tensor, excluded: torch.Tensor | None
    ) -> None:
        """Of cross-entropy: each pair's probability is sigmoid(logit).

        Args:
            positive: logits (B,). negative: logits (B, N). excluded: (B, N).
        """
        assert self.watcher is not None
        pick = _Pick(negative, self.watched)
        logits = pick(negative)
        weight = torch.full_like(logits, pick.each)
        if excluded is not None:
            weight = weight.masked_fill(pick(excluded), 0.0)
        self.watcher(
            Predictions(
                torch.cat([positive, logits.flatten()]).sigmoid(),
                torch.cat([label, torch.zeros_like(logits).flatten()]),
                torch.cat([torch.ones_like(positive), weight.flatten()]),
            )
        )

    @torch.no_grad()
    def tell_choice(
        self,
        positive: torch.Tensor,
        corrected: torch.Tensor,
        correction: torch.Tensor,
        total: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Of sampled softmax: an item's probability is its share of the row's choice, exp(score - total). A candidate
        stands for exp(correction) items of the choice, so the weighted probabilities of a row add up to 1.

        Args:
            positive: scores (B,). corrected: score + correction of each candidate, -inf for one that is left out (B,
                C). correction: (B, C), or (1, C) where it is the same for all rows. total: log of the sum over the row
                (B,). weight: of the rows (B,).
        """
        assert self.watcher is not None
        pick = _Pick(corrected, self.watched)
        scores, stands = pick(corrected), pick(correction.expand_as(corrected))
        each = pick.each * stands.exp().masked_fill(scores == -torch.inf, 0.0) * weight[:, None]
        self.watcher(
            Predictions(
                torch.cat([positive - total, (scores - stands - total[:, None]).flatten()]).exp(),
                torch.cat([torch.ones_like(positive), torch.zeros_like(scores).flatten()]),
                torch.cat([weight, each.flatten()]),
            )
        )


class _Pick:
    """Takes `count` columns of each row, other ones in the next row, so that the rows together use all of them."""

    def __init__(self, like: torch.Tensor, count: int) -> None:
        rows, columns = like.shape
        self._index = None
        self.each = 1.0
        """Columns that a picked one stands for."""
        if 0 < count < columns:
            self._index = (torch.arange(rows * count, device=like.device) % columns).view(rows, count)
            self.each = columns / count

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, columns) -> (rows, count)."""
        return values if self._index is None else values.gather(1, self._index)
