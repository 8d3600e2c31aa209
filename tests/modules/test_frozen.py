"""Frozen tables: plain and sharded give the same rows, stored in the bits that were asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable
from torch import nn
from torchrec import KeyedJaggedTensor

from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def tables(storage):
    return [
        FrozenTable(name="a", rows=11, dim=256, features=("x",), storage=storage),
        FrozenTable(name="b", rows=7, dim=8, features=("x", "y")),
    ]


def sources():
    rng = np.random.default_rng(0)
    return rng.normal(size=(11, 256)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)


def features():
    ids = torch.tensor([1, 6, 3, 5, 0, 6, 2, 2])
    return KeyedJaggedTensor(["x", "y"], ids, lengths=torch.ones(8, dtype=torch.int32))


def expected():
    a, b = (torch.from_numpy(s) for s in sources())
    b = torch.cat([b, torch.zeros(7, 2)], 1)  # dimension 6 is padded to 8
    ids = features().values()
    return {"x@a": a[ids[:4]], "x@b": b[ids[:4]], "y": b[ids[4:]]}


class OverTables(nn.Module):
    """The least model that DistributedModelParallel and a backward pass take."""

    def __init__(self, storage, device):
        super().__init__()
        self.frozen = FrozenEmbeddingBagCollection(tables(storage), device=device)
        self.top = nn.Linear(256, 1)

    def forward(self, batch):
        return self.top(self.frozen(batch)["x@a"]).sum()


def load(collection):
    for table, source in zip(("a", "b"), sources(), strict=True):
        collection.load(table, source)


def check(found, storage):
    # int8: a row of 256 normal numbers spans 6 or 7, and 7 / 510 is 0.014
    bound = {"fp32": 0.0, "fp16": 2e-3, "int8": 0.015}[storage]
    for key, want in expected().items():
        assert not found[key].requires_grad
        limit = bound if key == "x@a" else 0.0
        assert float((found[key] - want).abs().max()) <= limit, key


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8"])
def test_plain(storage):
    collection = FrozenEmbeddingBagCollection(tables(storage))
    load(collection)
    check(collection(features()), storage)
    assert not list(collection.parameters())
    assert not collection.state_dict()
    width = {"fp32": 4 * 256, "fp16": 2 * 256, "int8": 256 + 8}[storage]
    assert collection.storage_bytes() == 11 * width + 7 * 4 * 8


def sharded(layout):
    from recpress.trainer.sharding import shard

    found = []
    for storage in ("fp32", "fp16", "int8"):
        if storage == "int8" and layout == "column_wise":
            continue
        model = shard(OverTables(storage, "meta"), CPU, batch_size=4, sharding_types={"a": layout, "b": layout})
        load(model.module.frozen)
        check(model.module.frozen(features()), storage)
        before = [t.clone() for name in ("a", "b") for _, t in model.module.frozen.shards(name)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(features()).backward()
            optimizer.step()
        after = [t for name in ("a", "b") for _, t in model.module.frozen.shards(name)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert [name for name, _ in model.named_parameters()] == ["top.weight", "top.bias"]
        assert not model.fused_optimizer.state_dict()["state"]
        assert set(model.state_dict()) == {"top.weight", "top.bias"}
        found.append(model.module.frozen.storage_bytes())
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("layout", ["row_wise", "table_wise", "column_wise"])
def test_sharded(world, layout):
    per_rank = run_on_ranks(sharded, world, layout)
    whole = [11 * width + 7 * 4 * 8 for width in (4 * 256, 2 * 256, 256 + 8)]
    assert [sum(each) for each in zip(*per_rank, strict=True)] == whole[: len(per_rank[0])]
    if world == 2 and layout != "table_wise":
        assert max(each[0] for each in per_rank) <= 0.6 * whole[0]  # no rank holds a whole table


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
