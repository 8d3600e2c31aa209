"""Chooses the network that a run publishes: the best epoch on validation rows, unless the factorization is better.

An epoch is better than the factorization only if its mean gain on `evaluation.metric`, paired by case over the same
validation rows, is above NOISE standard errors, and the companion metric (HR@K for NDCG@K and the reverse) is not
lower. Otherwise the factorization's own ranking is published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recpress.trainer.config import EvaluationConfig
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import rank_heldout
from recpress.trainer.model.vectors import VectorFn

NOISE = 1.0
"""Minimum of the mean gain per case, in standard errors."""
Cases = dict[str, torch.Tensor]
"""Metric -> its value for each case of this rank."""


def paired_gain(network: torch.Tensor, start: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[float, float]:
    """(weighted mean, its standard error) of the difference per case, all (n,) on this rank. Collective."""
    difference = (network - start).double()
    weights = torch.ones_like(difference) if weights is None else weights
    here = ~difference.isnan()
    d, w = difference[here], weights[here]
    sums = torch.stack([w.sum(), (w * d).sum(), (w * w).sum(), (w * w * d).sum(), (w * w * d * d).sum()])
    total, of_d, squares, squares_d, squares_dd = all_reduce(sums).tolist()
    if not total:
        return 0.0, 0.0
    mean = of_d / total
    return mean, math.sqrt(max(0.0, squares_dd - 2 * mean * squares_d + mean**2 * squares)) / total


class Choice:
    """Ranks validation rows and compares networks with the start. All methods but `accepts` are collective.

    Args:
        config: metric and cut-offs.
        weights: of the cases of this rank, (len(heldout.users),); None: equal weights.
    """

    def __init__(
        self,
        heldout: SampledHeldout | FullHeldout,
        config: EvaluationConfig,
        ranks: Ranks,
        weights: np.ndarray | None = None,
    ) -> None:
        self._heldout, self._device = heldout, ranks.device
        self._weights = None if weights is None else torch.from_numpy(weights)
        self.config = config.during_training()
        self.metric, self.companion = config.metric, config.companion(isinstance(heldout, FullHeldout))
        self.start: dict[str, float] | None = None
        """Metrics of the factorization's own ranking."""
        self._start_cases: Cases = {}
        self.seen = False
        """Whether the factors have seen the validation rows. A gain on these says nothing about new rows, because a
        network may overfit to them, so that no network can be shown to be better."""
        self.popularity: dict[str, float] = {}

    def rank(self, user: VectorFn, item: VectorFn) -> tuple[dict[str, float], Cases]:
        """Weighted metrics of the vectors, and their values for each case of this rank."""
        cases: Cases = {}
        metrics = rank_heldout(self._heldout, user, item, self.config, self._device, cases)
        if self._weights is not None:
            zero = torch.zeros(len(self._weights))
            metrics |= {name: paired_gain(value, zero, self._weights)[0] for name, value in cases.items()}
        return metrics, cases

    def set_start(self, user: VectorFn, item: VectorFn) -> None:
        """Set the ranking that a network must beat to that of these vectors."""
        self.start, self._start_cases = self.rank(user, item)

    def set_popularity(self, counts: torch.Tensor) -> None:
        """Rank by the number of rows of each item, (items, 1)."""
        device = self._device
        self.popularity, _ = self.rank(
            lambda users: torch.ones(len(users), 1, device=device), vectors_from_factors(counts)
        )

    def evaluate(self, user: VectorFn, item: VectorFn) -> dict[str, float]:
        """Metrics of a network, with its gain over the start if there is one."""
        metrics, cases = self.rank(user, item)
        return metrics | self._gains(cases)

    def evaluate_start(self) -> dict[str, float]:
        """As `evaluate`, for the start, which is not ranked again."""
        assert self.start is not None
        return self.start | self._gains(self._start_cases)

    def _gains(self, cases: Cases) -> dict[str, float]:
        if self.start is None or self.metric not in cases:
            return {}
        gain, noise = paired_gain(cases[self.metric], self._start_cases[self.metric], self._weights)
        found = {"gain": gain, "gain_error": noise, "companion_gain": 0.0}
        if self.companion in cases:
            pair = cases[self.companion], self._start_cases[self.companion]
            found["companion_gain"] = paired_gain(*pair, self._weights)[0]
        return found

    def accepts(self, found: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than the start by more than noise, and not worse on the companion metric."""
        if self.start is None:
            return True
        return not self.seen and found["gain"] > NOISE * found["gain_error"] and found["companion_gain"] >= 0.0

    @property
    def num_cases(self) -> int:
        """Of all ranks."""
        return self._heldout.num_cases

    def describe(self) -> dict[str, Any]:
        """The entry `validation` of the manifest."""
        return {
            "cases": self.num_cases,
            "protocol": "full" if isinstance(self._heldout, FullHeldout) else "sampled",
            "metric": self.metric,
            "companion": self.companion,
            "factorization": self.start,
            "popularity": self.popularity,
            "seen_by_factors": self.seen,
        }
