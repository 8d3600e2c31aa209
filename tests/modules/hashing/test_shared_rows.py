"""Shared rows from the vectors of ids, and back."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.hashing import shared_rows as module
from recpress.modules.hashing.shared_rows import IdVectors, shared_rows, warm_rows
from tests.modules.hashing.map_cases import random_map

VECTORS = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
COUNTS = torch.arange(1.0, 51)[:, None]


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_shared_rows_are_those_of_weighted_least_squares(rows_per_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COLUMNS", 2)
    id_map = random_map(50, 9, rows_per_id)
    rows = shared_rows(id_map, VECTORS, COUNTS)
    matrix = torch.zeros(50, 9, dtype=torch.float64)
    for column in range(rows_per_id):
        weight = torch.ones(50) if id_map.weights is None else id_map.weights[:, column]
        matrix[torch.arange(50), id_map.rows[:, column].long()] += weight.double()
    root = COUNTS.double().sqrt()
    expected = torch.linalg.lstsq(root * matrix, root * VECTORS.double()).solution
    assert torch.allclose(rows.double(), expected, atol=1e-3)
    assert torch.allclose(IdVectors(id_map, rows)[slice(None)].double(), matrix @ rows.double(), atol=1e-5)


@pytest.mark.parametrize("mean_pooled", [False, True])
def test_warm_rows_sum_to_the_vector_of_an_id_that_shares_with_none(mean_pooled: bool) -> None:
    id_map = random_map(1, 9, 2)
    rows, used = warm_rows(VECTORS[:1], id_map, mean_pooled=mean_pooled)
    assert id_map.weights is not None
    assert used.sum() == len(id_map.rows.unique())
    if id_map.rows[0, 0] != id_map.rows[0, 1]:
        pair = rows[id_map.rows[0].long()]
        found = pair.mean(0) if mean_pooled else (pair * id_map.weights[0, :, None]).sum(0)
        assert torch.allclose(found, VECTORS[0], atol=1e-5)


def test_warm_rows_are_count_weighted_means() -> None:
    id_map = random_map(50, 9, 1)
    counts = COUNTS[:, 0].clone()
    counts[id_map.rows[:, 0] == 3] = 0  # the plain mean if all counts of a row are 0
    rows, used = warm_rows(VECTORS, id_map, counts)
    for row in range(9):
        members = id_map.rows[:, 0] == row
        assert bool(used[row]) == bool(members.any())
        weight = torch.ones(int(members.sum())) if row == 3 else counts[members]
        expected = (VECTORS[members] * weight[:, None]).sum(0) / weight.sum()
        assert torch.allclose(rows[row], expected, atol=1e-5)
