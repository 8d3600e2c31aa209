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
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.shared_als import SharedALS

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


def random_map(count: int, rows: int, rows_per_id: int, seed: int = 1) -> IdMap:
    generator = torch.Generator().manual_seed(seed)
    return IdMap(
        rows=torch.randint(rows, (count, rows_per_id), generator=generator, dtype=torch.int32),
        num_rows=rows,
        weights=None if rows_per_id == 1 else torch.rand(count, rows_per_id, generator=generator) + 0.1,
    )


def dense(id_map: IdMap) -> torch.Tensor:
    """A (num_ids, num_rows), float64."""
    out = torch.zeros(id_map.num_ids, id_map.num_rows, dtype=torch.float64)
    for way in range(id_map.rows_per_id):
        weights = torch.ones(id_map.num_ids) if id_map.weights is None else id_map.weights[:, way]
        out.index_put_((torch.arange(id_map.num_ids), id_map.rows[:, way].long()), weights.double(), accumulate=True)
    return out


def objective(users: torch.Tensor, items: torch.Tensor) -> float:
    """Hu et al., densely, in float64."""
    x, y = users.double(), items.double()
    seen = torch.zeros(USERS, ITEMS, dtype=torch.float64)
    seen[interactions()] = 1
    scores = x @ y.T
    loss = (CONFIG.confidence * seen * (1 - scores) ** 2).sum()
    loss += (seen - scores).square().sum() - seen.sum()  # the solvers leave the constant out: w_0 (s^2 - 2 s p)
    return float(loss + CONFIG.regularization * (x.square().sum() + y.square().sum()))


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_expand_and_collapse_are_a_matrix_and_its_transpose(rows_per_id: int) -> None:
    id_map = random_map(30, 7, rows_per_id)
    shared, a = MapMatrix(id_map), dense(id_map)
    rows, vectors = torch.randn(7, 4), torch.randn(30, 4)
    assert torch.allclose(shared.expand(rows).double(), a @ rows.double(), atol=1e-5)
    assert torch.allclose(shared.collapse(vectors).double(), a.T @ vectors.double(), atol=1e-5)


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_rows_that_fit_vectors_are_those_of_weighted_least_squares(rows_per_id: int) -> None:
    id_map = random_map(60, 9, rows_per_id)
    vectors, weights = torch.randn(60, 3), torch.rand(60) + 0.1
    rows = MapMatrix(id_map).fit(vectors, weights, steps=60)
    a, root = dense(id_map), weights.double().sqrt()[:, None]
    want = torch.linalg.lstsq(a * root, vectors.double() * root).solution
    assert torch.allclose(rows.double(), want, atol=1e-3)


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
