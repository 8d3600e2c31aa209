"""Rows for ids that arrive later."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.extend import extend_map, row_centers
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import METHODS, build_map
from recpress.modules.hashing.table_stats import TableStats


def made(method: str, num_ids: int = 100, rows: int = 30) -> tuple[IdMap, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(num_ids, 3, generator=generator)
    counts = torch.randint(1, 50, (num_ids,), generator=generator).float()
    table = TableStats(name="items", num_ids=num_ids, counts=counts, embedding=vectors, vocabulary="v1")
    return build_map(table, rows, HashConfig(method=method, seed=3)), vectors, counts


def test_centers_are_weighted_means() -> None:
    old = IdMap(rows=torch.tensor([[0], [2], [0], [0]], dtype=torch.int32), num_rows=3)
    centers = row_centers(old, np.array([[1.0, 0], [5, 5], [4, 3], [9, 9]], np.float32), torch.tensor([1.0, 2, 2, 0]))
    assert torch.equal(centers[[0, 2]], torch.tensor([[3.0, 2], [5, 5]]))
    assert bool(torch.isnan(centers[1]).all())


@pytest.mark.parametrize("method", ["learned", "cluster", "frequency"])
def test_ids_that_arrive_get_the_nearest_row_and_the_others_stay(method: str) -> None:
    old, vectors, counts = made(method)
    centers = row_centers(old, vectors, counts)
    arriving = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    arriving[[5, 6]] = 0
    new = extend_map(old, 140, centers=centers, embedding=arriving.numpy(), vocabulary="v2")
    assert torch.equal(new.rows[:100], old.rows)
    unknown = torch.isnan(centers).any(1)
    distance = torch.cdist(arriving, centers).masked_fill(unknown, torch.inf)
    expected = distance.argmin(1)
    expected[[5, 6]] = old.hashed(torch.tensor([105, 106]))[:, 0].long()
    assert torch.equal(new.rows[100:, 0].long(), expected)
    assert (new.num_rows, new.vocabulary, new.method, new.computed) == (old.num_rows, "v2", method, False)


@pytest.mark.parametrize("method", METHODS)
def test_without_an_embedding_ids_get_hashed_rows(method: str) -> None:
    old, _, _ = made(method)
    new = extend_map(old, 130)
    assert torch.equal(new.rows[:100], old.rows)
    arriving = torch.arange(100, 130)
    if method == "modulo":
        assert torch.equal(new.rows[100:, 0].long(), arriving % 30)
    else:
        assert torch.equal(new.rows[100:], old.hashed(arriving))


@pytest.mark.parametrize("method", ["modulo", "universal", "double"])
def test_a_formula_goes_on(method: str) -> None:
    """The extended map is the one that the method makes of all ids."""
    old, _, _ = made(method)
    new = extend_map(old, 130)
    assert new.computed
    assert torch.equal(new.rows, made(method, 130)[0].rows)


def test_a_formula_that_would_move_ids_is_given_up() -> None:
    assert not extend_map(made("quotient-remainder")[0], 130).computed


def test_weights_of_ids_that_arrive_are_one() -> None:
    old = IdMap(rows=torch.zeros(2, 2, dtype=torch.int32), num_rows=4, weights=torch.full((2, 2), 0.5))
    assert extend_map(old, 3).weights.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]


def test_nothing_arrives() -> None:
    old, vectors, counts = made("learned")
    new = extend_map(old, 100, centers=row_centers(old, vectors, counts), embedding=torch.empty(0, 3))
    assert torch.equal(new.rows, old.rows)


def test_what_does_not_fit_is_refused() -> None:
    old, vectors, counts = made("learned")
    centers = row_centers(old, vectors, counts)
    arriving = torch.randn(10, 3)
    with pytest.raises(ValueError, match="covers 100 ids, expected at least as many afterwards, not 99"):
        extend_map(old, 99)
    with pytest.raises(ValueError, match="together; one is missing"):
        extend_map(old, 110, centers=centers)
    with pytest.raises(ValueError, match=r"shape \(10, 3\), expected \(11, 3\)"):
        extend_map(old, 111, centers=centers, embedding=arriving)
    with pytest.raises(ValueError, match=r"centers have shape \(29, 3\), expected 30 rows"):
        extend_map(old, 110, centers=centers[:29], embedding=arriving)
    with pytest.raises(ValueError, match="no row has a center"):
        extend_map(old, 110, centers=centers * torch.nan, embedding=arriving)
    arriving[4, 1] = torch.nan
    with pytest.raises(ValueError, match="row 4 of the source holds NaN"):
        extend_map(old, 110, centers=centers, embedding=arriving)
    with pytest.raises(ValueError, match="'double': 2 rows per id"):
        extend_map(made("double")[0], 110, centers=centers, embedding=torch.randn(10, 3))
    with pytest.raises(ValueError, match="'double': 2 rows per id"):
        row_centers(made("double")[0], vectors)
    with pytest.raises(ValueError, match="covers 100 ids, the embedding has 99 rows"):
        row_centers(old, vectors[:99])
    with pytest.raises(ValueError, match=r"weights have shape \(99,\), expected \(100,\)"):
        row_centers(old, vectors, counts[:99])
