"""Predictions of a loss for the pairs of a batch, as input of training metrics: NE, AUC, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Predictions:
    """P pairs of a user and an item, without gradients."""

    probability: torch.Tensor
    """Probability that the pair is a positive, (P,)."""
    label: torch.Tensor
    """(P,) in [0, 1]."""
    weight: torch.Tensor
    """Number of pairs of the loss that this pair represents, (P,); 0 ignores it."""


class ObservedLoss(nn.Module):
    """A loss that passes its predictions to `observer`, if there is one.

    These are the predictions of the positives and of `observed` negatives per example (0: all). The weights of the
    negatives account for the others.
    """

    calibrated = True
    """Whether the calibration of the predictions is informative: that of a softmax is 1 by construction."""

    def __init__(self) -> None:
        super().__init__()
        self.observer: Callable[[Predictions], None] | None = None
        self.observed = 0

    def observes(self, scores: torch.Tensor) -> bool:
        """Whether there is an observer. None is called while a train pipeline traces the model."""
        return self.observer is not None and not isinstance(scores, torch.fx.Proxy)

    @torch.no_grad()
    def observe_pairs(
        self, positive: torch.Tensor, negative: torch.Tensor, label: torch.Tensor, excluded: torch.Tensor | None
    ) -> None:
        """For cross-entropy: the probability of a pair is sigmoid(logit).

        Args:
            positive: logits (B,). negative: logits (B, N). excluded: (B, N).
        """
        assert self.observer is not None
        pick = _Pick(negative, self.observed)
        logits = pick(negative)
        weight = torch.full_like(logits, pick.each)
        if excluded is not None:
            weight = weight.masked_fill(pick(excluded), 0.0)
        self.observer(
            Predictions(
                torch.cat([positive, logits.flatten()]).sigmoid(),
                torch.cat([label, torch.zeros_like(logits).flatten()]),
                torch.cat([torch.ones_like(positive), weight.flatten()]),
            )
        )

    @torch.no_grad()
    def observe_choice(
        self,
        positive: torch.Tensor,
        corrected: torch.Tensor,
        correction: torch.Tensor,
        total: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """For sampled softmax: the probability of an item is its softmax, exp(score - total). A candidate represents
        exp(correction) items, so the weighted probabilities of an example sum to 1.

        Args:
            positive: scores (B,). corrected: score + correction of each candidate, -inf if skipped (B, C).
            correction: (B, C), or (1, C) if equal for all examples. total: log of the sum over the example (B,).
            weight: of the examples (B,).
        """
        assert self.observer is not None
        pick = _Pick(corrected, self.observed)
        scores, stands = pick(corrected), pick(correction.expand_as(corrected))
        each = pick.each * stands.exp().masked_fill(scores == -torch.inf, 0.0) * weight[:, None]
        self.observer(
            Predictions(
                torch.cat([positive - total, (scores - stands - total[:, None]).flatten()]).exp(),
                torch.cat([torch.ones_like(positive), torch.zeros_like(scores).flatten()]),
                torch.cat([weight, each.flatten()]),
            )
        )


class _Pick:
    """Selects `count` columns of each row, different ones in successive rows, so that together they use all columns."""

    def __init__(self, like: torch.Tensor, count: int) -> None:
        rows, columns = like.shape
        self._index = None
        self.each = 1.0
        """Number of columns that a selected column represents."""
        if 0 < count < columns:
            self._index = (torch.arange(rows * count, device=like.device) % columns).view(rows, count)
            self.each = columns / count

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, columns) -> (rows, count)."""
        return values if self._index is None else values.gather(1, self._index)
