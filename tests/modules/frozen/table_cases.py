"""Frozen tables, their rows and a batch."""

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.frozen.kernel import FrozenTable

STORAGES = ("fp32", "fp16", "int8", "int4")


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


def load(collection):
    for table, source in zip(("a", "b"), sources(), strict=True):
        collection.load(table, source)


def check(found, storage):
    # a row of 256 normal numbers spans 6 or 7; in int8 7 / 510 is 0.014, in int4 7 / 30 is 0.233
    bound = {"fp32": 0.0, "fp16": 2e-3, "int8": 0.015, "int4": 0.25}[storage]
    for key, want in expected().items():
        assert not found[key].requires_grad
        limit = bound if key == "x@a" else 0.0
        assert float((found[key] - want).abs().max()) <= limit, key
