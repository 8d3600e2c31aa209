"""How frozen rows are stored and loaded."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable
from tests.modules.frozen.table_cases import STORAGES, check, features, load, sources, tables


def test_what_int4_cannot_hold_is_refused():
    collection = FrozenEmbeddingBagCollection([FrozenTable(name="a", rows=3, dim=8, features=("x",), storage="int4")])
    with pytest.raises(ValueError, match="too large for int4"):
        collection.load("a", np.full((3, 8), 1e6, np.float32))


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (3, 8), elements=st.floats(-1000, 1000, width=32)))
def test_int4_is_off_by_half_a_step_of_the_row(values):
    collection = FrozenEmbeddingBagCollection([FrozenTable(name="a", rows=3, dim=8, features=("x",), storage="int4")])
    collection.load("a", values)
    ((_, decoded),) = collection.decoded("a")
    span = values.max(1, keepdims=True) - values.min(1, keepdims=True)
    # half a step, and what float16 takes from the offset, and from the scale 15 times
    bound = span / 30 + (np.abs(values).max(1, keepdims=True) + span) * 2**-10 + 1e-6
    assert (np.abs(decoded.numpy() - values) <= bound).all()


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (3, 8), elements=st.floats(-1000, 1000, width=32)))
def test_int8_is_off_by_half_a_step_of_the_row(values):
    collection = FrozenEmbeddingBagCollection([FrozenTable(name="a", rows=3, dim=8, features=("x",), storage="int8")])
    collection.load("a", values)
    ((_, decoded),) = collection.decoded("a")
    span = values.max(1, keepdims=True) - values.min(1, keepdims=True)
    bound = span / 510 * 1.01 + 1e-6 * np.abs(values).max() + 1e-7
    assert (np.abs(decoded.numpy() - values) <= bound).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((10, 256), np.float32), "10 rows, expected 11"),
        (np.zeros((11, 12), np.float32), "dimension 12, expected 256"),
        (np.full((11, 256), np.nan, np.float32), "row 0 of the source holds NaN"),
        (np.full((11, 256), 1e6, np.float32), "too large for fp16"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source, message):
    collection = FrozenEmbeddingBagCollection(tables("fp16"))
    with pytest.raises(ValueError, match=message):
        collection.load("a", source)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_copy_and_a_pickle_keep_the_rows(storage):
    collection = FrozenEmbeddingBagCollection(tables(storage))
    load(collection)
    blob = io.BytesIO()
    torch.save(collection, blob)
    blob.seek(0)
    for other in (
        copy.deepcopy(collection),
        pickle.loads(pickle.dumps(collection)),
        torch.load(blob, weights_only=False),
    ):
        check(other(features()), storage)


def test_rows_that_were_never_loaded_are_refused():
    collection = FrozenEmbeddingBagCollection(tables("int8"))
    collection.load("a", sources()[0])
    with pytest.raises(ValueError, match=r"'b'.*never loaded.*load\('b'"):
        collection(features())
    load(collection)
    collection(features())
