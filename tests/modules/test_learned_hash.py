"""The module that replaces ids by rows: right rows, in any batch, sharded, pipelined, exported and quantised."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.learned_hash import LearnedHash, MappedHash
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.ranks import run_on_ranks


def id_map(num_ids: int, num_rows: int, ways: int = 1, weighted: bool = False, seed: int = 0) -> IdMap:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, num_rows, (num_ids, ways)).astype(np.int32))
    weights = torch.from_numpy(rng.random((num_ids, ways)).astype(np.float32)) if weighted else None
    return IdMap(rows=rows, num_rows=num_rows, weights=weights, seed=seed)


def batch(bags: dict[str, list[list[int]]], weights: list[float] | None = None) -> KeyedJaggedTensor:
    """bags: feature -> the ids of each row of the batch."""
    values = [i for rows in bags.values() for row in rows for i in row]
    lengths = [len(row) for rows in bags.values() for row in rows]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=None if weights is None else torch.tensor(weights),
    )


def by_hand(maps: dict[str, IdMap], features: KeyedJaggedTensor) -> dict[str, list[list[tuple[int, float]]]]:
    """Feature -> for each row of the batch the (row, weight) entries, id by id."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for key, jagged in features.to_dict().items():
        bags = zip(
            jagged.to_dense(),
            jagged.to_dense_weights() if features.weights_or_none() is not None else [None] * len(jagged.lengths()),
            strict=True,
        )
        found[key] = []
        for ids, given_weights in bags:
            entries = []
            for place, one in enumerate(ids.tolist()):
                given_weight = 1.0 if given_weights is None else float(given_weights[place])
                if key not in maps:
                    entries.append((one, given_weight))
                    continue
                table = maps[key]
                known = 0 <= one < table.num_ids
                rows = table.rows[one] if known else table.hashed(torch.tensor([one]))[0]
                own = table.weights[one] if known and table.weights is not None else torch.ones(table.ways)
                entries += [(int(r), given_weight * float(w)) for r, w in zip(rows, own, strict=True)]
            found[key].append(entries)
    return found


def check(maps: dict[str, IdMap], features: KeyedJaggedTensor, result: KeyedJaggedTensor) -> None:
    weighted = features.weights_or_none() is not None or any(m.weights is not None for m in maps.values())
    assert result.keys() == features.keys()
    assert result.stride() == features.stride()
    assert result.values().dtype == features.values().dtype
    assert (result.weights_or_none() is not None) == weighted
    for key, want in by_hand(maps, features).items():
        jagged = result[key]
        rows = [row.tolist() for row in jagged.to_dense()]
        assert rows == [[r for r, _ in bag] for bag in want], key
        if weighted:
            for bag, weights in zip(want, jagged.to_dense_weights(), strict=True):
                torch.testing.assert_close(weights, torch.tensor([w for _, w in bag]))


@st.composite
def cases(draw: Any) -> tuple[dict[str, IdMap], KeyedJaggedTensor]:
    keys = draw(st.permutations(["a", "b", "c", "d"]))
    pool = [
        id_map(draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 2)), draw(st.booleans()), seed)
        for seed in range(2)
    ]
    maps = {key: pool[draw(st.integers(0, 1))] for key in keys[: draw(st.integers(1, 4))]}
    order = draw(st.permutations(keys))
    rows = draw(st.integers(1, 3))
    bag = st.lists(st.integers(-3, 45) | st.integers(-(2**62), 2**62), max_size=4)
    bags = {key: draw(st.lists(bag, min_size=rows, max_size=rows)) for key in order}
    count = sum(len(row) for rows_ in bags.values() for row in rows_)
    weights = draw(st.none() | st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count))
    return maps, batch(bags, weights)


@settings(deadline=None, max_examples=150)
@given(case=cases(), packed=st.booleans())
def test_rows_are_those_of_the_map(case: tuple[dict[str, IdMap], KeyedJaggedTensor], packed: bool) -> None:
    maps, features = case
    check(maps, features, LearnedHash(maps, packed=packed)(features))
