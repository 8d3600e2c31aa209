"""The best evaluation of a run: its weights, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from recpress.trainer.loop.config import FitConfig
from recpress.trainer.model.weights import Snapshot


class BestModel:
    """Compares evaluations by `config.metric`."""

    def __init__(self, config: FitConfig) -> None:
        self.config = config
        self.peak = -math.inf
        """The best metric of all evaluations, accepted or not; negated if smaller is better."""
        self.worse = 0
        """Evaluations since the peak."""
        self._snapshot: Snapshot | None = None

    def update(
        self, found: Mapping[str, float], accepted: bool, best: Mapping[str, float] | None
    ) -> dict[str, float] | None:
        """`found` if it is the best evaluation so far, else None. Collective: rank 0 decides for all ranks.

        Args:
            accepted: whether it may be the best.
            best: the best one before.
        """
        decided = torch.tensor([found[self.config.metric], float(accepted)], dtype=torch.float64)
        dist.broadcast(decided, 0)  # the ranks must agree to the last bit
        value, accepted = float(decided[0]), bool(decided[1])
        sign = -1.0 if self.config.smaller_is_better else 1.0
        if sign * value > self.peak:
            self.peak, self.worse = sign * value, 0
        else:
            self.worse += 1
        better = best is None or sign * value > sign * best[self.config.metric]
        return {**found, self.config.metric: value} if accepted and better else None

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.worse

    @property
    def has_weights(self) -> bool:
        return self._snapshot is not None

    def take(self, model: torch.nn.Module) -> None:
        """Copy the weights of the model, over those of the best evaluation before."""
        self._snapshot = Snapshot.take(model, self._snapshot)

    def restore(self, model: torch.nn.Module) -> None:
        """Give the model the best weights, if `keep_best` and there are any."""
        if self._snapshot is not None and self.config.keep_best:
            self._snapshot.restore(model)
