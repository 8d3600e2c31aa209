"""Chunks and heavy rows do not change the result."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from recpress.modules.als import half_sweep
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.half_sweep import HalfSweep, Limits, Workers
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.als.solvers import SharedTerms, solve_cg
from tests.fake_cuda import CUDA, fake_cuda, without_waiting
from tests.modules.als.fit_cases import CONFIGS, ITEMS, USERS, log, run


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize("valued", [False, True])
def test_chunks_change_nothing(solver, valued):
    config = replace(CONFIGS["half"], solver=solver)
    whole, objectives = run(config, log(valued))
    cut, cut_objectives = run(config, log(valued), limits=Limits(interactions=64, rows=5, heavy=64))
    assert (torch.diff(whole.users, dim=0) != 0).any()
    torch.testing.assert_close(cut.users, whole.users, rtol=0, atol=1e-4)
    torch.testing.assert_close(cut.items, whole.items, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cut_objectives, objectives, rtol=1e-5)


def test_a_row_in_pieces_is_exact():
    config = replace(CONFIGS["half"], solver="cholesky")
    whole, objectives = run(config, log(True))
    cut, cut_objectives = run(config, log(True), limits=Limits(interactions=9, rows=5, heavy=7))
    torch.testing.assert_close(cut.users, whole.users, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cut_objectives, objectives, rtol=1e-5)


def half_sweep_of(triples):
    exchange = Exchange(None, torch.device("cpu"))
    builder = InteractionBuilder(USERS, ITEMS, exchange)
    builder.add(*triples)
    by_user, _ = builder.build()
    return HalfSweep("user", by_user, USERS, ITEMS, CONFIGS["half"], exchange, Workers(exchange.device))


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("block", [7, 1024])
def test_the_summary_of_a_gpu_is_that_of_a_cpu(monkeypatch, valued, block):
    half = half_sweep_of(log(valued))
    rows = torch.randn(USERS, 6, generator=torch.Generator().manual_seed(1)) * (half.degree > 0)[:, None]
    want = half.summary(rows)
    monkeypatch.setattr(half_sweep, "_SUMMED", block)
    monkeypatch.setattr(half_sweep, "_AT_ONCE", 3 * 36)  # three blocks
    monkeypatch.setattr(half_sweep, "host_reads", lambda rows: False)
    found = half.summary(rows)
    torch.testing.assert_close(found.gramian, want.gramian, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.popular, want.popular, rtol=1e-6, atol=1e-6)
    assert found.penalty == pytest.approx(want.penalty, rel=1e-6)


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
def test_factors_of_a_gpu_are_those_of_a_cpu(device, monkeypatch, solver):
    config, triples = replace(CONFIGS["half"], solver=solver), log(True)
    want, objectives = run(config, triples, limits=Limits(interactions=64, rows=5, heavy=64))
    for module in ("half_sweep", "solvers"):
        monkeypatch.setattr(f"recpress.modules.als.{module}.host_reads", lambda rows: False)
    als = ALS(config, USERS, ITEMS, limits=Limits(interactions=64, rows=5, heavy=64), device=device)
    als.add(*triples)
    found: list[float] = []
    factors = als.fit(lambda report: found.append(report.objective))
    torch.testing.assert_close(factors.users.cpu(), want.users, rtol=0, atol=1e-4)
    torch.testing.assert_close(factors.items.cpu(), want.items, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found, objectives, rtol=1e-5)


@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize(("steps", "relaxation"), [(2, 1.0), (1, 1.4)])
def test_on_cuda_no_chunk_waits(monkeypatch, valued, steps, relaxation):
    half = half_sweep_of(log(valued))
    half.pieces = half.pieces[:1]
    half.rounds = 1
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs CUDA
    with fake_cuda():
        half.device, half.degree = CUDA, half.degree.to(CUDA)
        half.weight = None if half.weight is None else half.weight.to(CUDA)
        rows, others = (torch.empty(count, 6, device=CUDA) for count in (USERS, ITEMS))
        shared = SharedTerms(*(torch.empty(size, device=CUDA) if size else 0.5 for size in ((6, 6), 0, (6, 6), 6)))
        solver = partial(solve_cg, steps=steps, relaxation=relaxation)

        def solved():
            return [half._solve_chunk(*chunk)[0] for chunk in half._chunks(rows, others, shared, solver)]

        [loss] = without_waiting(solved)
        assert (loss.device, loss.dtype) == (CUDA, torch.float64)
        both, penalty = without_waiting(lambda: half._sums_on_device(rows))
        assert both.device == penalty.device == CUDA
