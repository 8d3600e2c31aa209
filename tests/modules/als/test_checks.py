"""Warnings about collapsed factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.als.checks import check_factors, effective_rank
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import Factors
from recpress.modules.config import ALSConfig
from tests.modules.als.auto_cases import ITEMS, USERS, fit, planted


def random_log(rows: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Items drawn by popularity alone."""
    rng = np.random.default_rng(1)
    return rng.integers(0, USERS, rows), (ITEMS * rng.random(rows) ** 3).astype(np.int64)


def test_a_collapse_is_named_with_its_cause():
    users, items = planted()
    als, factors = fit(
        ALSConfig(factors=8, sweeps=4, mean_penalty=1e5, unobserved_ratio=4.0, item_exponent=0.0), users, items
    )
    warnings = check_factors(factors, als)
    assert "penalty" in warnings[0]
    assert "mean_penalty" in warnings[0]
    assert not any("popularity" in warning for warning in warnings)  # the log is not the cause


def test_a_log_without_tastes_is_said_to_be_no_better_than_popularity():
    als, factors = fit(ALSConfig(max_factors=16), *random_log())
    assert not als.choice.above_popularity
    warnings = check_factors(factors, als)
    assert any("popularity" in warning for warning in warnings)
    assert not any("auto" in warning for warning in warnings)  # it chose already


def test_effective_rank_of_known_matrices():
    exchange = Exchange(None, torch.device("cpu"))
    assert effective_rank(torch.eye(5), exchange) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4), exchange) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(7, 4), exchange) == 0


def test_vectors_of_both_sides_that_are_short_together_are_a_collapse():
    """Each is longer than the shortest that is named alone; a user and an item score at most 1e-5."""
    rows = torch.full((20, 4), 0.0016)
    (warning,) = check_factors(Factors(rows, rows, 20, 20))
    assert "score at most 1e-05" in warning
