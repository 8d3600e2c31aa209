"""The factorization against a dense float64 reference, by itself and on several ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.modules.als.auto import DEFAULTS, MOST_SWEEPS, TOLERANCE
from recpress.modules.als.factorization import ALS, initial_factors, initial_rows
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.als.half_sweep import FAR, Limits, _pieces
from recpress.modules.config import ALSConfig, ALSParameters
from tests.modules.als import als_reference as reference
from tests.modules.als.fit_cases import CONFIGS, ITEMS, USERS, log, run
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize("name", CONFIGS)
def test_objective_falls_and_is_that_of_the_factors(name, solver):
    config = replace(CONFIGS[name], solver=solver, sweeps=8)
    triples = log(valued=True)
    factors, found = run(config, triples)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(found))
    dense = reference.objective(
        config, factors.users.double().numpy(), factors.items.double().numpy(),
        *reference.dense(*triples, (USERS, ITEMS)),
    )  # fmt: skip
    assert found[-1] == pytest.approx(dense, rel=1e-5)
    assert not factors.users[7].any()
    assert not factors.items[5].any()


def test_duplicates_sum_and_ones_need_no_values():
    config = CONFIGS["hu"]
    users, items, _ = log()
    pairs, counts = np.unique(np.stack((users, items)), axis=1, return_counts=True)
    repeated, _ = run(config, (users, items, None))
    summed, _ = run(config, (*pairs, counts.astype(np.float32)))
    torch.testing.assert_close(repeated.users, summed.users, rtol=0, atol=1e-5)
    plain, _ = run(config, (*pairs, None))
    ones, _ = run(config, (*pairs, np.ones(pairs.shape[1], np.float32)))
    assert torch.equal(plain.users, ones.users)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 200),
    st.booleans(),
)
def test_any_log(seed, num_users, num_items, factors, rows, valued):
    """One exact sweep of any log is the reference's, whatever is empty, duplicated or wider than it is
    long.
    """
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, num_users, rows + 1), rng.integers(0, num_items, rows + 1)
    values = rng.random(rows + 1).astype(np.float32) if valued else None
    config = ALSParameters(factors=factors, sweeps=1, confidence=2.0, regularization=0.5, solver="cholesky", seed=seed)
    als = ALS(config, num_users, num_items)
    als.add(torch.from_numpy(users), items, values)
    found = als.fit()
    matrix, seen = reference.dense(users, items, values, (num_users, num_items))
    start = initial_rows(seed, 1, 0, num_items, factors).astype(float)
    x = reference.half_sweep(config, start, matrix, seen)
    y = reference.half_sweep(config, x, matrix.T, seen.T)
    np.testing.assert_allclose(found.users.numpy(), x, atol=1e-4 * max(1, np.abs(x).max()))
    np.testing.assert_allclose(found.items.numpy(), y, atol=1e-3 * max(1, np.abs(y).max()))


def test_gaps_between_ids_change_nothing():
    """Ids that nothing uses do not raise the penalty: the same log with ids 300 apart has the same factors."""
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, 40, 500), rng.integers(0, 30, 500)
    found = {}
    for gap in (1, 300):
        als = ALS(ALSConfig(factors=4, sweeps=30, auto=False, solver="cholesky"), 40 * gap, 30 * gap)
        als.add(users * gap, items * gap)
        found[gap] = als.fit()
    scores = {gap: (f.users[::gap] @ f.items[::gap].T).numpy() for gap, f in found.items()}
    np.testing.assert_allclose(scores[300], scores[1], atol=0.05)
    assert np.abs(scores[1]).max() > 0.2
    assert int((found[300].users.norm(dim=1) > 0).sum()) <= 40


def test_rows_without_interactions_are_in_no_chunk():
    """Of 10 million ids a handful occurs: the work is that of the handful, on rows and on sums."""
    degrees = np.zeros(10_000_000, np.int64)
    degrees[[3, 4, 5_000_000, 7_000_000, 7_000_005, 9_000_000]] = [2, 1, 9, 1, 1, 3]
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    assert list(_pieces(indptr, Limits(interactions=8, rows=16, heavy=4))) == [
        (3, 5, 0, 3),
        (5_000_000, 5_000_001, 3, 11), (5_000_000, 5_000_001, 11, 12),
        (7_000_000, 7_000_006, 12, 14),
        (9_000_000, 9_000_001, 14, 17),
    ]  # fmt: skip
    assert list(_pieces(np.zeros(5, np.int64), Limits(interactions=8, rows=16, heavy=4))) == []


def test_stops_on_request_and_by_tolerance():
    reports = []
    run(CONFIGS["hu"], log(), on_sweep=lambda report: reports.append(report) or report.sweep == 2)
    assert [r.sweep for r in reports] == [1, 2]
    assert reports[0].sweeps == 4
    assert reports[0].eta > 0
    _, all_sweeps = run(replace(CONFIGS["hu"], sweeps=50), log())
    _, few = run(replace(CONFIGS["hu"], sweeps=50, tolerance=1e-3), log())
    assert len(all_sweeps) == 50
    assert 2 < len(few) < 50
    assert few[:-1] == all_sweeps[: len(few) - 1]
    assert few[-3] - few[-2] < 1e-3 * few[-3]  # what ends the fit is seen one sweep before
    assert few[-1] < few[-2]


def test_auto_sweeps_until_the_objective_hardly_falls():
    reports, users, items = [], *np.random.default_rng(0).integers(0, 60, (2, 1500))

    def fit(**settings):
        als = ALS(ALSConfig(factors=4, **settings), 60, 60)
        als.add(users, items)
        reports.clear()
        als.fit(on_sweep=reports.append)
        return [report.objective for report in reports]

    chosen = fit()
    assert 2 < len(chosen) <= MOST_SWEEPS
    if len(chosen) < MOST_SWEEPS:
        assert chosen[-3] - chosen[-2] < TOLERANCE * chosen[-3]
    assert len(fit(sweeps=4)) == 4
    assert len(fit(auto=False)) == DEFAULTS["sweeps"]


def test_warm_start_goes_on():
    config = replace(CONFIGS["hu"], solver="cholesky", sweeps=2)
    _, straight = run(replace(config, sweeps=4), log())
    half, _ = run(config, log())
    before = half.items.clone()
    _, second = run(config, log(), start=half)
    np.testing.assert_allclose(second, straight[2:], rtol=1e-6)
    assert torch.equal(half.items, before)
    with pytest.raises(ValueError, match="start factors"):
        run(replace(config, factors=5), log(), start=half)


def test_initial_vectors_depend_on_seed_side_and_row_alone():
    whole = initial_rows(3, 1, 0, 40, 6)
    np.testing.assert_array_equal(np.concatenate([initial_rows(3, 1, a, a + 8, 6) for a in range(0, 40, 8)]), whole)
    assert len(np.unique(np.concatenate((whole, initial_rows(3, 0, 0, 40, 6), initial_rows(4, 1, 0, 40, 6))))) == 720
    assert whole.std() == pytest.approx(0.1 / 6**0.5, rel=0.1)
    shards = [initial_factors(CONFIGS["hu"], USERS, ITEMS, r, 3, torch.device("cpu")).items for r in range(3)]
    assert torch.equal(torch.cat(shards), initial_factors(CONFIGS["hu"], USERS, ITEMS, 0, 1, torch.device("cpu")).items)


def test_bad_fits_are_named():
    with pytest.raises(ValueError, match="no interactions"):
        ALS(CONFIGS["hu"], USERS, ITEMS).fit()
    with pytest.raises(ValueError, match="regularization is -1"):
        ALS(replace(CONFIGS["hu"], regularization=-1.0), USERS, ITEMS)
    start, _ = run(CONFIGS["hu"], log())
    start.items[3] = float("nan")
    with pytest.raises(ValueError, match=r"objective is nan after sweep 1|not finite"):
        run(CONFIGS["hu"], log(), start=start)
    flat = replace(CONFIGS["hu"], regularization=0.0, unobserved_weight=0.0, solver="cholesky", factors=20)
    with pytest.raises(ValueError, match=r"equations of user \d+ are not positive definite"):
        run(flat, log())


def on_rank(config: ALSParameters, valued: bool, limits: Limits | None):
    """Each rank adds an odd share of the rows, in two chunks; one adds almost nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    triples = log(valued)
    mine = np.flatnonzero((np.arange(400) ** 2) % world == rank)
    als = ALS(config, USERS, ITEMS, limits=limits)
    for part in np.array_split(mine, 2):
        als.add(*(None if column is None else column[part] for column in triples))
    objectives: list[float] = []
    factors = als.fit(lambda report: objectives.append(report.objective) or (rank == 0 and report.sweep == 3))
    return factors.users, factors.items, objectives


SMALL = Limits(interactions=40, rows=6, heavy=30)


@pytest.mark.parametrize(
    ("world", "valued", "limits"),
    [(2, False, None), (2, False, replace(FAR, table=0)), (3, True, SMALL), (3, True, replace(SMALL, table=0))],
    ids=["gathered", "fetched", "small chunks, gathered", "small chunks, fetched"],
)
def test_ranks_agree_with_one(world, valued, limits):
    config = replace(CONFIGS["half"], solver="auto")
    alone, objectives = run(config, log(valued), limits=limits, on_sweep=lambda report: report.sweep == 3)
    results = run_on_ranks(on_rank, world, config, valued, limits)
    assert all(result[2] == results[0][2] for result in results)
    np.testing.assert_allclose(results[0][2], objectives, rtol=1e-5)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), alone.users, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), alone.items, rtol=0, atol=1e-4)
    assert [len(r[0]) for r in results] == [RowBlocks(USERS, world).size(r) for r in range(world)]


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="user factors of rank 1 of 2: expected 26 rows"):
        Factors(torch.zeros(27, 4), torch.zeros(15, 4), USERS, ITEMS, rank=1, world=2)


def test_values_that_are_all_zero_are_refused():
    als = ALS(ALSParameters(factors=3), 5, 4)
    als.add(np.arange(4), np.arange(4), np.zeros(4))
    with pytest.raises(ValueError, match=r"all values .* are 0"):
        als.fit()


def test_factors_without_end_are_refused():
    with pytest.raises(ValueError, match="factors is 1000000, expected at most"):
        ALS(ALSParameters(factors=1_000_000), 5, 4).add(np.arange(4), np.arange(4))
