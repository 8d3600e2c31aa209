"""Every method by name: what each promises, and what all of them refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import universal_hash
from recpress.modules.hashing.methods import METHODS, build_map
from recpress.modules.hashing.table_stats import TableStats

COMPUTED = ("modulo", "universal", "double", "quotient-remainder")


def made(num_ids: int, seed: int = 0, **more: object) -> TableStats:
    generator = torch.Generator().manual_seed(seed)
    given_ = {
        "counts": torch.randint(1, 1000, (num_ids,), generator=generator).float(),
        "embedding": torch.randn(num_ids, 4, generator=generator),
        "vocabulary": "v1",
    }
    return TableStats(name="items", num_ids=num_ids, **(given_ | more))


@pytest.mark.parametrize("method", METHODS)
def test_a_map_meets_its_budget_and_says_what_it_is(method: str) -> None:
    table = made(200)
    found = build_map(table, 60, HashConfig(method=method, seed=5))
    assert found.num_ids == 200
    assert found.num_rows <= 60
    assert (found.method, found.vocabulary, found.seed) == (method, "v1", 5)
    assert found.computed == (method in COMPUTED)
    again = build_map(table, 60, HashConfig(method=method, seed=5))
    assert torch.equal(found.rows, again.rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, -1, 201])
def test_a_budget_that_is_none_is_refused(method: str, rows: int) -> None:
    with pytest.raises(ValueError, match=rf"'items': a budget of {rows} rows, expected 1 to 200"):
        build_map(made(200), rows, HashConfig(method=method))


@pytest.mark.parametrize("method", ["learned", "cluster"])
def test_with_a_row_for_each_id_no_id_shares(method: str) -> None:
    found = build_map(made(50), 50, HashConfig(method=method))
    assert len(found.rows.unique()) == 50


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"quotient-remainder"}))
def test_one_row_is_enough(method: str) -> None:
    found = build_map(made(50), 1, HashConfig(method=method, exclusive_share=0))
    assert found.num_rows == 1


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'magic'; expected one of modulo, universal,.*learned"):
        build_map(made(10), 5, HashConfig(method="magic"))


@pytest.mark.parametrize("method", ["frequency", "hybrid", "learned"])
def test_counts_are_asked_for(method: str) -> None:
    with pytest.raises(ValueError, match=f"'items': method '{method}' needs the counts"):
        build_map(made(10, counts=None), 5, HashConfig(method=method))


@pytest.mark.parametrize("method", ["cluster", "learned"])
def test_an_embedding_is_asked_for(method: str) -> None:
    with pytest.raises(ValueError, match=f"'items': method '{method}' needs an embedding"):
        build_map(made(10, embedding=None), 5, HashConfig(method=method))


def test_modulo_is_the_remainder() -> None:
    found = build_map(made(20), 7, HashConfig(method="modulo"))
    assert found.rows[:, 0].tolist() == [i % 7 for i in range(20)]


@pytest.mark.parametrize(("method", "rows_per_id"), [("universal", 1), ("double", 2)])
def test_hashed_methods_are_what_serving_computes(method: str, rows_per_id: int) -> None:
    found = build_map(made(500), 90, HashConfig(method=method, seed=4))
    assert torch.equal(found.rows, universal_hash(torch.arange(500), 90, 4, rows_per_id))
    assert torch.equal(found.rows, found.hashed(torch.arange(500)))


def test_double_separates_what_one_hash_joins() -> None:
    """500 ids on 90 rows: all share a row with some other, few share both."""
    found = build_map(made(500), 90, HashConfig(method="double")).rows
    pairs = found.unique(dim=0)
    assert len(pairs) > 450


def test_frequency_gives_the_frequent_ids_rows_of_their_own() -> None:
    counts = torch.tensor([1.0, 9, 3, 9, 5, 0, 2, 7])
    found = build_map(made(8, counts=counts), 6, HashConfig(method="frequency")).rows[:, 0].tolist()
    # 3 private: ids 1, 3 (a tie, lower first), 7; the others at 3 + id mod 3
    assert found == [3, 0, 5, 1, 4, 5, 3, 2]


@pytest.mark.parametrize("private", [0.0, 0.25, 1.0])
def test_hybrid_hashes_the_others_into_the_shared_rows(private: float) -> None:
    rows = 200 if private == 1 else 40
    table = made(200)
    found = build_map(table, rows, HashConfig(method="hybrid", exclusive_share=private)).rows
    number = int(private * rows)
    top = torch.sort(table.counts, descending=True, stable=True).indices[:number]
    assert torch.equal(found[top], torch.arange(number, dtype=torch.int32)[:, None].expand(-1, 2))
    tail = torch.ones(200, dtype=torch.bool)
    tail[top] = False
    assert bool((found[tail] >= number).all())


@pytest.mark.parametrize("method", ["frequency", "hybrid", "learned"])
@pytest.mark.parametrize(("private", "why"), [(1.0, "leave none for the other 190 ids"), (1.5, "expected 0 to 1")])
def test_a_share_that_leaves_nothing_is_refused(method: str, private: float, why: str) -> None:
    with pytest.raises(ValueError, match=f"'items': .*{why}"):
        build_map(made(200), 10, HashConfig(method=method, exclusive_share=private))


@given(ids=st.integers(1, 3000), rows=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_quotient_remainder_tells_all_ids_apart(ids: int, rows: int) -> None:
    rows = min(rows, ids)
    possible = [k for k in range(1, rows) if k + -(-ids // k) <= rows]
    table = TableStats(name="items", num_ids=ids)
    config = HashConfig(method="quotient-remainder")
    if not possible:
        with pytest.raises(ValueError, match=r"'items': a budget of \d+ rows is too small"):
            build_map(table, rows, config)
        return
    found = build_map(table, rows, config)
    k = possible[-1]
    assert found.num_rows == k + -(-ids // k) <= rows
    assert np.array_equal(found.rows[:, 0].numpy(), np.arange(ids) % k)
    assert len(found.rows.unique(dim=0)) == ids


@pytest.mark.parametrize(
    "config", [HashConfig(method="learned"), HashConfig(method="cluster"), HashConfig(rows_per_id=2)]
)
def test_a_tables_own_weight_is_an_embedding(config):
    weight = torch.nn.Parameter(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
    counts = torch.arange(60.0, requires_grad=True)
    found = build_map(TableStats(name="t", num_ids=60, counts=counts, embedding=weight), 7, config)
    want = build_map(TableStats(name="t", num_ids=60, counts=counts.detach(), embedding=weight.detach()), 7, config)
    assert torch.equal(found.rows, want.rows)
    assert weight.grad is None


@pytest.mark.parametrize(
    "config", [HashConfig(method="learned"), HashConfig(method="cluster"), HashConfig(rows_per_id=2)]
)
def test_vectors_whose_distances_overflow_are_refused(config):
    values = torch.ones(60, 8)
    values[3] = 1e30
    with pytest.raises(ValueError, match=r"'t': row 3 .*1e\+30.*overflow"):
        build_map(TableStats(name="t", num_ids=60, counts=torch.ones(60), embedding=values), 7, config)


def test_tensors_without_dense_values_are_refused():
    for values in (torch.empty(6, 2, device="meta"), torch.eye(6).to_sparse()):
        with pytest.raises(ValueError, match="'t': embedding is a tensor"):
            TableStats(name="t", num_ids=6, embedding=values)
