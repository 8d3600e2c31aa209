"""Rows that follow from the id by a formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import universal_hash
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from tests.modules.hashing.table_cases import made


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
