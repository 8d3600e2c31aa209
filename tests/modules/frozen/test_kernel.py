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
from recpress.modules.frozen.kernel import (
    FrozenKernel,
    FrozenTable,
    decode_rows,
    encode_rows,
    from_half_scale,
    stored_row_bytes,
    to_half_scale,
)
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


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (5, 8), elements=st.floats(-1000, 1000, width=32)))
def test_int8_of_cuda_has_scale_and_offset_in_float16(values):
    rows = encode_rows(torch.from_numpy(values), "int8")
    half = to_half_scale(rows)
    assert half.shape == (5, 12)
    back = from_half_scale(half)
    assert back.shape == rows.shape
    span, least = values.max(1, keepdims=True) - values.min(1, keepdims=True), np.abs(values.min(1, keepdims=True))
    bound = span / 400 + least / 2000 + 2e-5
    assert (np.abs(decode_rows(back, "int8").numpy() - values) <= bound).all()


def test_int8_of_cuda_is_looked_up_written_and_read(monkeypatch):
    """With the kernel, the layout and the types of ids of CUDA, on a CPU."""
    plain = FrozenEmbeddingBagCollection(tables("int8"))
    load(plain)
    want, size = plain.decoded("a")[0][1], plain.shards("a")[0][1].shape
    monkeypatch.setattr(FrozenKernel, "half_scale", property(lambda kernel: kernel.storage == "int8"))
    other, third = (FrozenEmbeddingBagCollection(tables("int8")) for _ in range(2))
    load(other)
    check(other(features()), "int4")  # its bound; int8 of CUDA is off by a little more than that of a CPU
    assert other.kernels().__next__().stored(0).shape == (11, 256 + 4)
    assert torch.equal(other(features())["x@a"], other.decoded("a")[0][1][features().values()[:4]])
    torch.testing.assert_close(other.decoded("a")[0][1], want, atol=0.01, rtol=0)
    for table in "ab":
        third.write(table, [rows.clone() for _, rows in other.shards(table)])
        assert torch.equal(third.decoded(table)[0][1], other.decoded(table)[0][1])
    assert third.shards("a")[0][1].shape == size
    large = np.full((11, 256), 1e6, np.float32)
    with pytest.raises(ValueError, match=r"table 'a': a value of 1e\+06 is too large for int8 on CUDA"):
        third.load("a", large)


def test_rows_of_cuda_are_padded_to_16_bytes():
    assert [stored_row_bytes(storage, 20, "cuda") for storage in STORAGES] == [80, 40, 32, 16]
    assert [stored_row_bytes(storage, 20, "cpu") for storage in STORAGES] == [80, 40, 28, 14]
