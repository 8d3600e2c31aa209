"""The hash function that an export ships gives the ids that the reader gives."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.dataset import hashed_ids
from recpress.trainer.export.hash_ids import hash_ids, kind_of

SIZES = st.integers(1, 1 << 31)


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1)), SIZES)
def test_integers(values, size):
    expected = hashed_ids.hash_ids(pa.array(values, pa.int64()), size).tolist()
    assert hash_ids(values, size).tolist() == hash_ids(np.array(values, np.int64), size).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)), SIZES)
def test_unsigned_integers(values, size):
    expected = hashed_ids.hash_ids(pa.array(values, pa.uint64()), size).tolist()
    assert hash_ids(values, size).tolist() == hash_ids(np.array(values, np.uint64), size).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.text(max_size=20)), st.lists(st.binary(max_size=40)), SIZES)
def test_text_and_bytes(texts, values, size):
    assert hash_ids(texts, size).tolist() == hashed_ids.hash_ids(pa.array(texts, pa.string()), size).tolist()
    assert hash_ids(values, size).tolist() == hashed_ids.hash_ids(pa.array(values, pa.binary()), size).tolist()


def test_arrays_of_text_and_narrow_integers():
    assert hash_ids(np.array(["a", "b"]), 1000).tolist() == [367, 212]
    assert hash_ids(np.array([-1, 5], np.int8), 99).tolist() == hash_ids([-1, 5], 99).tolist()
    assert hash_ids([], 5).tolist() == []


@pytest.mark.parametrize("values", [[1, "1"], [True], [1.0], [None], [2**64]])
def test_other_values_are_refused(values):
    with pytest.raises(ValueError, match=r"expected|exceeds 64 bits"):
        hash_ids(values, 10)


def test_kinds():
    assert (kind_of(["a", b"b"]), kind_of([np.int32(3), 4])) == ("text", "integers")
