"""Factorization with shared rows: against the full factorization, and against least squares done densely."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.interactions import CSR, InteractionBuilder
from recpress.modules.config import ALSParameters
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_als import SharedALS
from tests.modules.hashing.map_cases import random_map

CONFIG = ALSParameters(factors=6, sweeps=12, confidence=4.0, regularization=2.0, solver="cholesky")


USERS, ITEMS = 50, 40


def interactions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((USERS, ITEMS)) < 0.15)
    return users, items


def csrs() -> tuple[CSR, CSR]:
    builder = InteractionBuilder(USERS, ITEMS, Exchange(None, torch.device("cpu")))
    builder.add(*interactions())
    return builder.build()


def identity(count: int) -> IdMap:
    return IdMap(rows=torch.arange(count, dtype=torch.int32)[:, None], num_rows=count)


def objective(users: torch.Tensor, items: torch.Tensor) -> float:
    """Hu et al., densely, in float64."""
    x, y = users.double(), items.double()
    seen = torch.zeros(USERS, ITEMS, dtype=torch.float64)
    seen[interactions()] = 1
    scores = x @ y.T
    loss = (CONFIG.confidence * seen * (1 - scores) ** 2).sum()
    loss += (seen - scores).square().sum() - seen.sum()  # the solvers leave the constant out: w_0 (s^2 - 2 s p)
    return float(loss + CONFIG.regularization * (x.square().sum() + y.square().sum()))


def test_with_a_row_for_each_id_it_is_the_full_factorization() -> None:
    als = ALS(CONFIG, USERS, ITEMS)
    als.add(*interactions())
    full = als.fit()
    shared = SharedALS(CONFIG, *csrs(), identity(USERS), identity(ITEMS)).fit(steps=10)
    assert objective(shared.users, shared.items) == pytest.approx(objective(full.users, full.items), rel=1e-3)


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_the_objective_falls_and_is_the_one_that_is_said(rows_per_id: int) -> None:
    said: list[float] = []
    maps = random_map(USERS, 12, rows_per_id), random_map(ITEMS, 10, rows_per_id, seed=2)
    found = SharedALS(CONFIG, *csrs(), *maps).fit(on_sweep=lambda sweep, value: said.append(value))
    assert len(said) == CONFIG.sweeps
    assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(said))
    constant = len(interactions()[0])  # of `loss_of`: + w_0 for each interaction
    assert said[-1] == pytest.approx(objective(found.users, found.items) + constant, rel=1e-4)


def test_a_map_of_another_number_of_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="item map: covers 39 ids, expected 40"):
        SharedALS(CONFIG, *csrs(), identity(USERS), identity(ITEMS - 1))
