"""An id map as a sparse matrix."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import MapMatrix
from tests.modules.hashing.map_cases import random_map


def dense(id_map: IdMap) -> torch.Tensor:
    """A (num_ids, num_rows), float64."""
    out = torch.zeros(id_map.num_ids, id_map.num_rows, dtype=torch.float64)
    for way in range(id_map.rows_per_id):
        weights = torch.ones(id_map.num_ids) if id_map.weights is None else id_map.weights[:, way]
        out.index_put_((torch.arange(id_map.num_ids), id_map.rows[:, way].long()), weights.double(), accumulate=True)
    return out


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
