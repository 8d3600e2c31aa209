"""Weighted k-means: known answers, the exchange of rows, cells, bounded memory, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import recpress.modules.hashing.k_means as clustering
from recpress.modules.hashing.k_means import k_means, lloyd, nearest


def made(n: int, d: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(20, d, generator=generator)
    x = middles[torch.randint(20, (n,), generator=generator)] + torch.randn(n, d, generator=generator)
    return x, torch.rand(n, generator=generator) ** -0.5


def distortion(x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, k: int) -> float:
    """By the definition, in float64."""
    x, weights, rows = x.double(), weights.double(), rows.long()
    total = 0.0
    for row in range(k):
        v, w = x[rows == row], weights[rows == row]
        if len(v):
            middle = (v * w[:, None]).sum(0) / w.sum()
            total += float((w * (v - middle).square().sum(1)).sum())
    return total


@pytest.fixture
def small_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few thousand ids make many cells, and two levels of them."""
    monkeypatch.setattr(clustering, "CELL", 500)


def test_separate_groups_are_found() -> None:
    middles = torch.tensor([[0.0, 0], [100, 0], [0, 100], [100, 100], [50, 300]])
    of = torch.arange(200) % 5
    found = k_means(middles[of] + torch.rand(200, 2), None, 5, seed=1, iterations=20)
    for group in range(5):
        assert len(found.assignment[of == group].unique()) == 1
    assert len(found.assignment.unique()) == 5


def test_the_best_of_all_partitions_of_a_line() -> None:
    """{0, 1}, {12}, {20, 22} cost 1/2 and 2; where the first two are heavy, they are split and the others joined."""
    x = torch.tensor([[0.0], [1], [12], [20], [22]])
    found = k_means(x, None, 3, seed=0, iterations=10)
    assert found.assignment[0] == found.assignment[1]
    assert found.assignment[3] == found.assignment[4]
    assert found.distortion == pytest.approx(0.5 + 2)
    found = k_means(x, torch.tensor([1000.0, 1000, 1, 1, 1]), 3, seed=0, iterations=10)
    assert found.assignment[0] != found.assignment[1]
    assert found.distortion == pytest.approx(float((x[2:] - x[2:].mean()).square().sum()))


@given(n=st.integers(2, 60), k=st.integers(1, 60), d=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_iteration_lowers_the_distortion_or_leaves_it(n: int, k: int, d: int, seed: int) -> None:
    x, weights = made(n, d, seed)
    k = min(k, n)
    found = lloyd(x, weights, k, seed=seed, iterations=12)
    assert found.distortion == pytest.approx(distortion(x, weights, found.assignment, k), rel=1e-3, abs=1e-4)
    for before, after in zip(found.history, found.history[1:], strict=False):
        assert after <= before * (1 + 1e-5) + 1e-6


def test_equal_vectors_leave_rows_over() -> None:
    found = k_means(torch.ones(30, 3), None, 7, seed=0, iterations=5)
    assert found.distortion == 0
    assert bool(torch.isfinite(found.centers).all())


def test_exchanges_give_heavy_ids_rows_of_their_own() -> None:
    """Ten heavy ids inside of one cloud: alone they cost nothing, together with others they cost the most."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(500)
    weights[:10] = 1e6
    found = k_means(x, weights, 30, seed=0, iterations=15)
    heavy = found.assignment[:10]
    assert len(heavy.unique()) == 10
    assert torch.allclose(found.centers[heavy.long()], x[:10], atol=1e-3)


def test_an_exchange_lowers_the_distortion_by_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without exchanges the same start ends higher."""
    x, weights = made(2000)
    with_them = lloyd(x, weights, 200, seed=3, iterations=15).distortion
    monkeypatch.setattr(clustering, "_exchange", lambda *_: 0)
    assert with_them < 0.97 * lloyd(x, weights, 200, seed=3, iterations=15).distortion


def test_nearest_is_the_nearest() -> None:
    x, _ = made(1000)
    centers, _ = made(300, seed=1)
    assert torch.equal(nearest(x, centers), torch.cdist(x, centers).argmin(1))


@pytest.mark.usefixtures("small_cells")
def test_cells_come_close_to_one_cell() -> None:
    x, weights = made(6000)
    found = k_means(x, weights, 600, seed=0, iterations=15)
    assert found.distortion == pytest.approx(distortion(x, weights, found.assignment, 600), rel=1e-3)
    assert len(found.history) == clustering.ROUNDS
    assert found.history == sorted(found.history, reverse=True)
    whole = lloyd(x, weights, 600, seed=0, iterations=15)
    assert found.distortion < 1.15 * whole.distortion
    members = torch.zeros(600).index_add_(0, found.assignment.long(), weights)
    assert int((members == 0).sum()) <= 6


@pytest.mark.usefixtures("small_cells")
@pytest.mark.parametrize("kind", ["array", "memory map", "tensor"])
def test_a_small_buffer_and_any_source_give_the_same_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = made(3000)
    whole = k_means(x, weights, 300, seed=0, iterations=10)
    monkeypatch.setattr("recpress.modules.row_source.BLOCK_BYTES", 16 * 100)  # 100 ids
    np.save(tmp_path / "x.npy", x.numpy())
    source = {"array": x.numpy(), "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"), "tensor": x}[kind]
    seen = []
    again = k_means(
        source, weights, 300, seed=0, iterations=10, buffer_bytes=32 * 700, progress=lambda *now: seen.append(now)
    )
    assert torch.equal(again.assignment, whole.assignment)
    assert torch.equal(again.centers, whole.centers)
    assert {total for _, _, total in seen} == {3000}
    assert {stage for stage, done, _ in seen if done == 3000} == {"partition", *(f"k-means {i}/5" for i in range(1, 6))}


@pytest.mark.usefixtures("small_cells")
def test_the_seed_decides() -> None:
    x, weights = made(2000)
    one, same, other = (k_means(x, weights, 200, seed=seed, iterations=4).assignment for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.usefixtures("small_cells")
def test_the_number_of_threads_does_not() -> None:
    x, weights = made(4000, d=16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(k_means(x, weights, 400, seed=0, iterations=6).assignment)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.usefixtures("small_cells")
def test_rows_go_where_the_distortion_is() -> None:
    """Half of the ids at one point, the rest spread out: one row, and maybe a few idle ones, for the first half."""
    x, _ = made(4000)
    x[:2000] = 7.0
    found = k_means(x, None, 400, seed=0, iterations=6)
    assert len(found.assignment[:2000].unique()) == 1
    assert len(found.assignment[2000:].unique()) > 350


@pytest.mark.usefixtures("small_cells")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [1, 300, 3000])
def test_a_vector_that_is_not_finite_is_named(bad: float, k: int) -> None:
    x, _ = made(3000)
    x[1234, 2] = bad
    with pytest.raises(ValueError, match="'items': row 1234 of the source holds NaN or infinity"):
        k_means(x, None, k, seed=0, iterations=2, name="items")


@pytest.mark.parametrize(
    ("k", "weights", "iterations", "why"),
    [
        (0, None, 5, "0 clusters of 50 ids"),
        (51, None, 5, "51 clusters of 50 ids"),
        (5, torch.ones(49), 5, r"weights have shape \(49,\), expected \(50,\)"),
        (5, None, 0, "0 iterations"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(k: int, weights: torch.Tensor | None, iterations: int, why: str) -> None:
    with pytest.raises(ValueError, match=f"'items': {why}"):
        k_means(torch.randn(50, 3), weights, k, seed=0, iterations=iterations, name="items")


def test_ids_without_weight_get_rows_all_the_same() -> None:
    x, weights = made(300)
    weights[:200] = 0
    found = k_means(x, weights, 30, seed=0, iterations=10)
    nearest_row = torch.cdist(x, found.centers).argmin(1)
    assert float((nearest_row == found.assignment)[:200].float().mean()) > 0.9
    assert k_means(x, torch.zeros(300), 30, seed=0, iterations=3).distortion > 0
