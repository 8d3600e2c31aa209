"""Interactions become CSRs by user and by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.interactions import InteractionBuilder
from tests.modules.als import als_reference as reference
from tests.modules.als.fit_cases import CONFIGS, ITEMS, USERS


@pytest.mark.parametrize("valued", [False, True])
def test_a_log_added_at_once_is_the_log_added_in_parts(valued):
    """More rows than a buffer, duplicates among them, and the caller's arrays changed after `add`."""
    rng = np.random.default_rng(0)
    rows = (1 << 17) + 1000
    users, items = rng.integers(0, 2000, rows, np.int32), rng.integers(0, 300, rows, np.int32)
    values = rng.integers(0, 4, rows).astype(np.float64) if valued else None
    built = []
    for chunks in (1, 7):
        builder = InteractionBuilder(2000, 300, Exchange(None, torch.device("cpu")))
        for part in np.array_split(np.arange(rows), chunks):
            chunk = [None if column is None else column[part] for column in (users, items, values)]
            builder.add(*chunk)
            for column in chunk[:2]:
                column[:] = 0
        assert builder.rows == rows
        built.append(builder.build())
    for one, other in zip(*built, strict=True):
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.values, other.values)
    matrix, _ = reference.dense(users, items, values, (2000, 300))
    found = np.zeros_like(matrix)
    csr = built[0][0]
    found[np.repeat(np.arange(2000), np.diff(csr.indptr)), csr.indices] = csr.values
    np.testing.assert_array_equal(found, matrix)


def test_a_bad_value_past_the_first_buffer_is_named_and_nothing_is_taken():
    builder = InteractionBuilder(5, 5, Exchange(None, torch.device("cpu")))
    ids, values = np.ones(1 << 17, np.int32), np.ones(1 << 17)
    values[100_000] = np.nan
    with pytest.raises(ValueError, match=r"interaction 100000 \(user 1, item 1\): value nan"):
        builder.add(ids, ids, values)
    assert builder.rows == 0
    assert [len(csr.indices) for csr in builder.build()] == [0, 0]


@pytest.mark.parametrize(
    ("triple", "message"),
    [
        (([0, 1], [0, ITEMS], None), r"interaction 3: item id 31, expected 0 to 30"),
        (([0, -1], [0, 1], None), r"interaction 3: user id -1, expected 0 to 52"),
        (([0, 1], [0, 1], [1.0, float("nan")]), r"interaction 3 \(user 1, item 1\): value nan"),
        (([0, 1], [0, 1], [-1.0, 1.0]), r"interaction 2 \(user 0, item 0\): value -1"),
        (([0.5], [0], None), r"user ids: expected one dimension of integers"),
        (([0, 1], [0], None), r"differ in length"),
    ],
)
def test_bad_interactions_are_named(triple, message):
    als = ALS(CONFIGS["hu"], USERS, ITEMS)
    als.add([1, 2], [3, 4])
    with pytest.raises(ValueError, match=message):
        als.add(*triple)
