"""Which network of a run is published: the best epoch on validation rows, and none that is worse than its factors.

A later epoch counts as better than the factorization only where its mean gain on `evaluation.metric`, case by case over
the same validation rows, is above NOISE standard errors, and the companion metric (HR@K for NDCG@K and the reverse) is
not lower. Otherwise the factorization's own ranking is published.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recpress.trainer.config import EvaluationConfig
from recpress.trainer.distributed.collectives import all_reduce, rank_and_world
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import rank_heldout
from recpress.trainer.model.vectors import VectorFn

logger = logging.getLogger(__name__)

NOISE = 1.0
"""Standard errors of the mean gain per case that a network must gain."""
Cases = dict[str, torch.Tensor]
"""Metric -> its value of each case of this rank."""


def paired_gain(network: torch.Tensor, start: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[float, float]:
    """(weighted mean, its standard error) of the difference, case by case, (n,) each on this rank. Collective."""
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
    """Ranks validation rows, and says which network is better than the start. All methods but `accepts` are collective.

    Args:
        config: metric and cut-offs.
        weights: of the cases of this rank, (len(heldout.users),); None: all the same.
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
        """Whether the factors have seen the validation rows. What a network gains on these says nothing about new rows
        (it may gain by learning them better by heart), so that no network can be shown to be better."""
        self.popularity: dict[str, float] = {}

    def rank(self, user: VectorFn, item: VectorFn) -> tuple[dict[str, float], Cases]:
        """Weighted metrics of the vectors, and their values of each case of this rank."""
        cases: Cases = {}
        metrics = rank_heldout(self._heldout, user, item, self.config, self._device, cases)
        if self._weights is not None:
            zero = torch.zeros(len(self._weights))
            metrics |= {name: paired_gain(value, zero, self._weights)[0] for name, value in cases.items()}
        return metrics, cases

    def set_start(self, user: VectorFn, item: VectorFn) -> None:
        """Take these vectors' ranking as what a network must beat."""
        self.start, self._start_cases = self.rank(user, item)

    def set_popularity(self, counts: torch.Tensor) -> None:
        """Rank by the number of rows of each item, (items, 1)."""
        device = self._device
        self.popularity, _ = self.rank(
            lambda users: torch.ones(len(users), 1, device=device), vectors_from_factors(counts)
        )

    def evaluate(self, user: VectorFn, item: VectorFn) -> dict[str, float]:
        """Metrics of a network, with its gain over the start where there is one."""
        metrics, cases = self.rank(user, item)
        return metrics | self._gains(cases)

    def evaluate_start(self) -> dict[str, float]:
        """The same of the start, which is not ranked again."""
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
        """Whether an evaluation is better than the start, by more than noise and not worse on the companion."""
        if self.start is None:
            return True
        return not self.seen and found["gain"] > NOISE * found["gain_error"] and found["companion_gain"] >= 0.0

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the validation rows."""
        return {
            "cases": self._heldout.num_cases,
            "protocol": "full" if isinstance(self._heldout, FullHeldout) else "sampled",
            "metric": self.metric,
            "companion": self.companion,
            "factorization": self.start,
            "popularity": self.popularity,
            "seen_by_factors": self.seen,
        }


def warn(text: str) -> None:
    """One line on rank 0."""
    if rank_and_world()[0] == 0:
        logger.warning("%s", text)
