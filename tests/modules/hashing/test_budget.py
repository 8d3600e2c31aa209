"""The split of one budget between tables."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.modules.config import HashConfig
from recpress.modules.hashing.budget import DistortionSplit, distortions, split_by_cap, split_by_ids, split_rows
from recpress.modules.hashing.table_stats import TableStats

CONFIG = HashConfig(count_exponent=1.0)


def table(vectors, counts=None, name="t"):
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    counts = torch.ones(len(vectors)) if counts is None else torch.as_tensor(counts)
    return TableStats(name=name, num_ids=len(vectors), counts=counts, embedding=vectors)


def points(distinct, ids, scale=1.0):
    """`ids` vectors of which `distinct` differ, far from each other."""
    return scale * 10 * torch.eye(distinct)[torch.arange(ids) % distinct]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 100))
def test_the_budget_is_used_and_no_table_gets_none_or_more_than_its_ids(sizes, share, seed):
    random = torch.Generator().manual_seed(seed)
    tables = [table(torch.randn(n, 3, generator=random), torch.randint(0, 9, (n,), generator=random)) for n in sizes]
    budget = len(sizes) + int(share * (sum(sizes) + 5 - len(sizes)))
    rows = split_rows(tables, budget, CONFIG)
    assert sum(rows) == min(budget, sum(sizes))
    assert all(1 <= k <= n for k, n in zip(rows, sizes, strict=True))
    assert rows == split_rows(tables, budget, CONFIG)


def test_as_many_rows_as_there_are_different_vectors():
    tables = [table(points(4, 400)), table(points(2, 1000)), table(points(16, 90)), table(torch.ones(500, 3))]
    assert split_rows(tables, 4 + 2 + 16 + 1, CONFIG) == [4, 2, 16, 1]


def test_the_best_split_of_a_small_case():
    """Users and items of one dimension, where the best distortion of every number of rows is found by trying all."""

    def best(values, weights, k):
        order = np.argsort(values)
        v, w = values[order], weights[order]
        cuts = itertools.combinations(range(1, len(v)), k - 1)
        return min(
            sum(
                (w[a:b] * (v[a:b] - np.average(v[a:b], weights=w[a:b])) ** 2).sum()
                for a, b in itertools.pairwise((0, *cut, len(v)))
            )
            for cut in cuts
        )

    users, items = np.array([0.0, 1, 9, 10, 30, 33, 60, 62]), np.array([0.0, 5, 50, 55, 100, 102, 160, 163])
    of_users, of_items = np.array([5.0, 1, 2, 2, 9, 1, 3, 3]), np.array([1.0, 1, 2, 1, 1, 4, 1, 1])
    tables = [table(users[:, None], of_users), table(items[:, None], of_items)]
    for budget in (5, 8):
        rows = split_rows(tables, budget, CONFIG)
        costs = [
            best(users, of_users, k) + best(items, of_items, budget - k)
            for k in range(max(1, budget - 8), min(8, budget - 1) + 1)
        ]
        of_rows = best(users, of_users, rows[0]) + best(items, of_items, rows[1])
        assert of_rows == pytest.approx(min(costs))


def test_more_rows_for_what_is_accessed_more_and_for_what_is_spread_more():
    vectors = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    often, rare = split_rows([table(vectors, torch.full((4000,), 16.0)), table(vectors)], 500, CONFIG)
    # D = A / k in two dimensions, A in proportion to the counts: equal marginals at k in proportion to sqrt(16).
    assert often / rare == pytest.approx(4, rel=0.3)
    wide, narrow = split_rows([table(4 * vectors), table(vectors)], 500, CONFIG)
    assert wide / narrow == pytest.approx(4, rel=0.3)


def test_power_zero_forgets_the_counts():
    vectors = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(1000.0) + 1
    alike = [table(vectors), table(2 * vectors)]
    for power, same in ((0.0, True), (1.0, False)):
        rows = split_rows([table(vectors, counts), table(2 * vectors)], 200, HashConfig(count_exponent=power))
        assert (rows == split_rows(alike, 200, HashConfig(count_exponent=power))) == same


def test_a_sample_stands_for_a_large_table():
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(60_000, 2, generator=random)
    counts = (torch.rand(60_000, generator=random) * 9 + 1).floor()
    sizes, found = distortions(table(vectors, counts), CONFIG)
    assert sizes[-1] == 60_000
    assert found[-1] == 0
    mean = (vectors * counts[:, None]).sum(0) / counts.sum()
    assert found[0] == pytest.approx(float(((vectors - mean).square().sum(1) * counts).sum()), rel=0.05)
    assert all(b <= a for a, b in itertools.pairwise(found))


def test_ids_that_were_never_accessed_are_no_obstacle():
    nothing = table(points(4, 40), torch.zeros(40))
    assert split_rows([nothing, table(points(4, 40))], 5, CONFIG) == [1, 4]
    half = table(points(4, 40), (torch.arange(40) % 4 < 2) * 3)
    assert split_rows([half, table(points(4, 40))], 6, CONFIG) == [2, 4]


def test_bad_input():
    tables = [table(points(2, 9)), table(points(2, 9))]
    with pytest.raises(ValueError, match="a budget of 1 rows for 2 tables"):
        split_rows(tables, 1, CONFIG)
    vectors = points(2, 9)
    vectors[3, 1] = torch.nan
    with pytest.raises(ValueError, match="table 'x': row 3 of the embedding holds NaN"):
        split_rows([table(vectors, name="x")], 2, CONFIG)
    with pytest.raises(ValueError, match="'x': method 'split' needs the counts"):
        split_rows([TableStats(name="x", num_ids=2, embedding=torch.ones(2, 1))], 1, CONFIG)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.floats(0, 1))
def test_a_common_cap_and_shares_by_ids_use_the_budget(ids, share):
    budget = len(ids) + round(share * (sum(ids) - len(ids)))
    for split in (split_by_cap, split_by_ids):
        rows = split(ids, budget)
        assert sum(rows) == budget
        assert all(1 <= number <= size for number, size in zip(rows, ids, strict=True))


def test_a_cap_leaves_small_tables_full():
    assert split_by_cap([1000, 5, 400, 20], 225) == [100, 5, 100, 20]
    assert split_by_ids([1000, 10], 101) == [99, 2]
    with pytest.raises(ValueError, match="expected at least 1 row each"):
        split_by_cap([10, 10], 1)


def test_rows_within_bytes_pay_for_their_map():
    """A map of 600 ids of table a takes bits; table b is full and needs none."""
    random = torch.Generator().manual_seed(0)
    tables = [table(torch.randn(600, 4, generator=random), name="a"), table(points(4, 4), name="b")]
    split = DistortionSplit(tables, CONFIG)

    def size(place, rows):
        ids = tables[place].num_ids
        return 16 * rows + (0 if rows == ids else ids * max(1, (rows - 1).bit_length()) // 8)

    sizes = {}
    for limit in (700, 1500, 4000, 9_600 + 64):
        rows = split.rows_within(size, limit)
        sizes[limit] = sum(size(place, number) for place, number in enumerate(rows))
        assert 0.85 * limit <= sizes[limit] <= limit
        assert rows[1] == 4
    assert rows == [600, 4]
    with pytest.raises(ValueError, match="does not fit"):
        split.rows_within(size, 50)
