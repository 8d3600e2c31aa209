"""Sums of two rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.additive import additive_rows
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.shared_rows import shared_rows
from recpress.modules.hashing.table_stats import TableStats


def planted(n: int = 400, each: int = 5, d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that are each the sum of a long row and a short row; and counts."""
    random = torch.Generator().manual_seed(0)
    long, short = 10 * torch.randn(each, d, generator=random), torch.randn(each, d, generator=random)
    pick = torch.randint(each, (2, n), generator=random)
    return long[pick[0]] + short[pick[1]], torch.rand(n, generator=random) * 50 + 1


def test_planted_sums_are_found() -> None:
    x, counts = planted()
    found = additive_rows(x, counts, 10, seed=0, iterations=30)
    assert found.history[-1] < 1e-4 * float((x.square().sum(1) * counts).sum())
    assert found.rows[:, 0].max() < 5 <= found.rows[:, 1].min()
    assert torch.allclose(found.centers[found.rows.long()].sum(1), x, atol=0.05)


def test_the_distortion_never_rises_and_is_that_of_the_rows() -> None:
    x, counts = planted(each=20)
    found = additive_rows(x, counts, 16, seed=1, iterations=30)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found.history))
    error = (x - found.centers[found.rows.long()].sum(1)).square().sum(1)
    assert found.history[-1] == pytest.approx(float((error * counts).sum()), rel=1e-4)


def test_sums_of_two_rows_are_closer_than_one_row_and_need_no_weights() -> None:
    random = torch.Generator().manual_seed(0)
    table = TableStats(name="t", num_ids=500, counts=torch.ones(500), embedding=torch.randn(500, 4, generator=random))
    error = {}
    for rows_per_id in (1, 2):
        id_map = build_map(table, 40, HashConfig(rows_per_id=rows_per_id, row_weights=False))
        assert id_map.weights is None
        assert id_map.rows_per_id == rows_per_id
        near = MapMatrix(id_map).expand(shared_rows(id_map, table.embedding))
        error[rows_per_id] = float((table.embedding - near).square().sum())
    assert error[2] < 0.6 * error[1]


def test_a_single_row_counts_twice() -> None:
    x = torch.randn(5, 2)
    found = additive_rows(x, None, 1, seed=0, iterations=3)
    assert not found.rows.any()
    assert torch.allclose(2 * found.centers[0], x.mean(0), atol=1e-5)
