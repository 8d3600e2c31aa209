"""Solvers of the normal equations agree with a dense reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.modules.als.factorization import initial_rows
from recpress.modules.als.half_sweep import block_rows
from recpress.modules.als.solvers import Scratch
from recpress.modules.config import ALSParameters
from tests.modules.als import als_reference as reference
from tests.modules.als.fit_cases import CONFIGS, ITEMS, USERS, log, run


def initial(config: ALSParameters) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        initial_rows(config.seed, side, 0, n, config.factors).astype(float) for side, n in ((0, USERS), (1, ITEMS))
    )


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_solver_is_the_dense_reference(name, valued):
    config = replace(CONFIGS[name], solver="cholesky")
    triples = log(valued)
    matrix, seen = reference.dense(*triples, (USERS, ITEMS))
    x, y, objectives = reference.fit(config, *initial(config), matrix, seen)
    factors, found = run(config, triples, chunks=3)
    # float32 solves against float64: relative to the largest entry
    assert np.abs(factors.users.numpy() - x).max() < 1e-4 * np.abs(x).max()
    assert np.abs(factors.items.numpy() - y).max() < 1e-4 * np.abs(y).max()
    np.testing.assert_allclose(found, objectives, rtol=1e-5)
    assert not factors.users[7].any()
    assert not factors.items[5].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_solvers_meet(name):
    """Conjugate gradients and the exact solver go to the same objective."""
    ends = {
        solver: run(replace(CONFIGS[name], solver=solver, sweeps=60), log())[1][-1]
        for solver in ("auto", "cg", "cholesky")
    }
    assert ends["auto"] == pytest.approx(ends["cholesky"], rel=5e-3)
    assert ends["cg"] == pytest.approx(ends["cholesky"], rel=5e-3)


def test_working_arrays_are_reused_and_bounded():
    scratch = Scratch()
    large = scratch.floats("a", torch.empty(300, 200))
    small = scratch.floats("a", torch.empty(7, dtype=torch.int32))
    assert small.data_ptr() == large.data_ptr()
    assert (small.shape, small.dtype) == ((7,), torch.float32)
    assert scratch.floats("b", small).data_ptr() != small.data_ptr()
    assert scratch.floats("a", torch.empty(700, 200)).shape == (700, 200)
    assert [block_rows(dim) for dim in (1, 32, 128, 1 << 20)] == [1024, 1024, 256, 1]
