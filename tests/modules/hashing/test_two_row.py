"""Two weighted rows an id."""

from __future__ import annotations

import itertools

import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.hashing.two_row import extend_two_row, two_row_dictionary


def planted(n: int = 600, k: int = 12, d: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that are each the weighted sum of two of k orthogonal-ish rows; and counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(max(k, d), d, generator=generator)).Q[:k]
    first = torch.randint(k, (n,), generator=generator)
    second = (first + 1 + torch.randint(k - 1, (n,), generator=generator)) % k
    share = torch.rand(n, 2, generator=generator) + 0.2
    return share[:, :1] * rows[first] + share[:, 1:] * rows[second], torch.rand(n, generator=generator) * 50


def test_the_criterion_never_rises_and_the_rows_explain_the_vectors() -> None:
    x, counts = planted(k=10)
    pairs = two_row_dictionary(x, counts**0.5, 60, seed=0, iterations=30)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(pairs.history))
    energy = float((x.square().sum(1) * counts**0.5).sum())
    assert pairs.history[-1] < 0.05 * energy


def test_two_rows_are_closer_than_one() -> None:
    x, counts = planted(n=800, k=16, d=16)
    table = TableStats(name="t", num_ids=len(x), counts=counts, embedding=x)
    error = {}
    for rows_per_id in (1, 2):
        id_map = build_map(table, 40, HashConfig(method="learned", rows_per_id=rows_per_id))
        shared = MapMatrix(id_map)
        near = shared.expand(shared.fit(x, counts))
        error[rows_per_id] = float(((x - near).square().sum(1) * counts).sum())
    assert error[2] < 0.5 * error[1]


def test_the_same_seed_gives_the_same_pairs_and_weights_are_half_precision() -> None:
    x, counts = planted()
    one, two = (two_row_dictionary(x, counts, 20, seed=3, iterations=6) for _ in range(2))
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.centers, two.centers)
    assert one.weights.dtype == torch.float16
    assert bool(torch.isfinite(one.weights).all())


def test_a_single_row_and_zero_vectors_are_no_trouble() -> None:
    x = torch.zeros(5, 4)
    x[0, 0] = 2.0
    pairs = two_row_dictionary(x, None, 1, seed=0, iterations=3)
    assert pairs.rows.max() == 0
    assert bool(torch.isfinite(pairs.centers).all())


def test_an_id_that_arrives_is_as_near_as_one_that_was_there() -> None:
    x, counts = planted(n=500, k=8, d=8)
    pairs = two_row_dictionary(x[:400], counts[:400], 30, seed=0, iterations=15)
    old = IdMap(rows=pairs.rows, num_rows=30, weights=pairs.weights, method="learned")
    arriving = torch.cat([x[400:], torch.zeros(1, 8)])
    new = extend_two_row(old, 501, arriving, pairs.centers, vocabulary="v2")
    assert torch.equal(new.rows[:400], old.rows)
    assert new.vocabulary == "v2"
    near = MapMatrix(new).expand(pairs.centers)
    error = (x - near[:500]).square().sum(1) / x.square().sum(1)
    assert float(error[400:].mean()) < 2 * float(error[:400].mean()) + 0.02
    assert torch.equal(new.rows[500:], old.hashed(torch.tensor([500])))
    with pytest.raises(ValueError, match=r"expected two with weights"):
        extend_two_row(IdMap(rows=old.rows[:, :1], num_rows=30), 501, arriving, pairs.centers)


def test_private_rows_and_pairs_do_not_go_together() -> None:
    x, counts = planted(n=30)
    table = TableStats(name="t", num_ids=30, counts=counts, embedding=x)
    with pytest.raises(ValueError, match=r"table 't': exclusive_share is 0\.5"):
        build_map(table, 10, HashConfig(method="learned", rows_per_id=2, exclusive_share=0.5))
