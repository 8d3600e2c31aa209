"""Compressed collections give what the original ones gave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.compression.collections import CompressedEmbeddingBagCollection
from recpress.modules.compression.replace import compress
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_rows import warm_rows
from tests.modules.compression.model_cases import (
    FEATURES,
    IDS,
    collection,
    id_map,
    made,
    one_row_each,
    source,
)


def bags(kjt: KeyedJaggedTensor, feature: str, vectors: torch.Tensor, mean: bool = False) -> torch.Tensor:
    """Pooled vectors, bag by bag, from one vector for each id."""
    pooled = []
    for ids in kjt[feature].to_dense():
        bag = vectors[ids].sum(0)
        pooled.append(bag / max(1, len(ids)) if mean else bag)
    return torch.stack(pooled)


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_keys_and_values(pooling: PoolingType, rows_per_id: int) -> None:
    """Shared, frozen, both and untouched tables in one collection; the dimension is not a multiple of 4."""
    old = collection(6, pooling)
    want = old(made())
    before = {name: bag.weight.detach().clone() for name, bag in old.embedding_bags.items()}
    shared, both = id_map(rows_per_id=rows_per_id), id_map(7, rows_per_id=rows_per_id, seed=1)
    counts = torch.arange(IDS).float()
    new, _ = compress(
        old, {"t1": shared, "t3": both}, {"t2": source(dim=6), "t3": source(dim=6)}, counts={"t3": counts}
    )
    assert isinstance(new, CompressedEmbeddingBagCollection)
    found = new(made())
    assert found.keys() == want.keys()
    assert found.length_per_key() == want.length_per_key()
    mean = pooling == PoolingType.MEAN

    def vectors(one: IdMap, rows: torch.Tensor) -> torch.Tensor:
        return rows[one.rows.long()].mean(1) if mean else rows[one.rows.long()].sum(1)

    trained = new.trainable.embedding_bags["t1"].weight.detach()
    torch.testing.assert_close(trained, warm_rows(before["t1"], shared, mean_pooled=mean)[0])
    of_both = warm_rows(source(dim=6), both, counts, mean_pooled=mean)[0]
    each = {
        "f0": before["t0"],
        "f1": vectors(shared, trained),
        "f1b": vectors(shared, trained),
        "f2": source(dim=6),
        "f3": vectors(both, of_both),
    }
    for feature, of_id in each.items():
        torch.testing.assert_close(found[feature], bags(made(), feature, of_id, mean), msg=feature)
    assert [c.num_embeddings for c in new.embedding_bag_configs()] == [IDS, 10, IDS, 7]
    assert {n for n, _ in new.named_parameters()} == {f"trainable.embedding_bags.{t}.weight" for t in ("t0", "t1")}


def test_two_tables_of_one_feature_keep_their_keys() -> None:
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=IDS, embedding_dim=4, feature_names=["f0", "f1"])
        for name in ("a", "b", "c")
    ]
    old = EmbeddingBagCollection(configs)
    one = one_row_each()
    want = old(made())
    keep = {name: bag.weight.detach().clone() for name, bag in old.embedding_bags.items()}
    new, report = compress(old, dict.fromkeys("abc", one), {"b": keep["b"]})
    found = new(made())
    assert found.keys() == want.keys() == ["f0@a", "f1@a", "f0@b", "f1@b", "f0@c", "f1@c"]
    torch.testing.assert_close(found.values(), want.values())
    assert [t.map_bytes for t in report.tables] == [4 * IDS, 0, 0]  # one map


@pytest.mark.parametrize("rows_per_id", [1, 2])
@pytest.mark.parametrize("weighted_map", [False, True])
@pytest.mark.parametrize("weighted_bags", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_per_sample_weights(rows_per_id: int, weighted_map: bool, weighted_bags: bool, frozen: bool) -> None:
    """Weights of the batch count where they did before, those of the map always; of frozen rows too."""
    old = collection(is_weighted=weighted_bags)
    one = id_map(rows_per_id=rows_per_id, weighted=weighted_map)
    new, _ = compress(old, {"t0": one}, {"t0": source()} if frozen else None)
    rows = new.frozen.decoded("t0")[0][1] if frozen else new.trainable.embedding_bags["t0"].weight
    weights = torch.ones(IDS, rows_per_id) if one.weights is None else one.weights
    of_id = (rows[one.rows.long()] * weights[:, :, None]).sum(1)
    features = made(weights=True)
    jagged = features["f0"]
    given = jagged.to_dense_weights() if weighted_bags else [torch.ones(len(i)) for i in jagged.to_dense()]
    want = [(of_id[ids] * w[:, None]).sum(0) for ids, w in zip(jagged.to_dense(), given, strict=True)]
    torch.testing.assert_close(new(features)["f0"], torch.stack(want))


def variable(seed: int = 0) -> KeyedJaggedTensor:
    """Five examples whose keys have two to four different bags."""
    rng = np.random.default_rng(seed)
    keys, strides = ["f0", "f1", "f1b", "f2", "f3"], [2, 3, 4, 2, 3]
    lengths = torch.from_numpy(rng.integers(0, 4, sum(strides)).astype(np.int32))
    inverse = torch.stack([torch.from_numpy(rng.integers(0, stride, 5)) for stride in strides])
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(rng.integers(0, IDS, int(lengths.sum()))),
        lengths=lengths,
        weights=torch.from_numpy(rng.random(int(lengths.sum())).astype(np.float32)),
        stride_per_key_per_rank=[[stride] for stride in strides],
        inverse_indices=(keys, inverse),
    )


@pytest.mark.parametrize(("pooling", "weighted"), [("SUM", False), ("SUM", True), ("MEAN", False)])
def test_a_batch_with_another_stride_for_each_key(pooling: str, weighted: bool) -> None:
    """Frozen tables give what trainable ones give for a variable batch."""
    old = collection(pooling=PoolingType[pooling], is_weighted=weighted)
    want = old(variable())
    rows = {t: old.embedding_bags[t].weight.detach().clone() for t in FEATURES}
    new, _ = compress(old, {"t3": one_row_each()}, {t: rows[t] for t in ("t0", "t1", "t3")})
    found = new(variable())
    assert found.keys() == want.keys()
    torch.testing.assert_close(found.values(), want.values())
    torch.testing.assert_close(torch.fx.symbolic_trace(new)(variable()).values(), want.values())


def test_sequences() -> None:
    torch.manual_seed(0)
    configs = [
        EmbeddingConfig(name=t, num_embeddings=IDS, embedding_dim=4, feature_names=f) for t, f in FEATURES.items()
    ]
    model = nn.ModuleDict({"sequence": EmbeddingCollection(configs)})
    want = model["sequence"](made())
    compress(model, {"t0": one_row_each(), "t1": one_row_each()})
    found = model["sequence"](made())
    assert list(found) == list(want)
    for key, value in want.items():
        torch.testing.assert_close(found[key].values(), value.values())
        assert torch.equal(found[key].lengths(), value.lengths())
    compress(other := nn.ModuleList([EmbeddingCollection(configs)]), {"t0": id_map(3)})
    assert other[0].trainable.embeddings["t0"].weight.shape == (3, 4)


@pytest.mark.parametrize("need_indices", [False, True])
def test_sequences_of_all_kinds_of_tables(need_indices: bool) -> None:
    """Two weighted rows, frozen, both, and untouched, in one EmbeddingCollection; the batch's weights are ignored."""
    configs = [
        EmbeddingConfig(name=t, num_embeddings=IDS, embedding_dim=6, feature_names=f) for t, f in FEATURES.items()
    ]
    old = EmbeddingCollection(configs, need_indices=need_indices)
    untouched = old.embeddings["t0"].weight.detach().clone()
    two, both = id_map(rows_per_id=2, weighted=True), id_map(7, rows_per_id=2, seed=1)
    new, _ = compress(old, {"t1": two, "t3": both}, {"t2": source(dim=6), "t3": source(dim=6)})
    assert isinstance(new, EmbeddingCollection)
    trained = new.embeddings["t1"].weight
    of_both = warm_rows(source(dim=6), both)[0]
    vectors = {
        "f0": untouched,
        "f1": (trained[two.rows.long()] * two.weights[:, :, None]).sum(1),
        "f1b": (trained[two.rows.long()] * two.weights[:, :, None]).sum(1),
        "f2": source(dim=6),
        "f3": of_both[both.rows.long()].sum(1),
    }
    batch = made(weights=True)
    found = new(batch)
    assert list(found) == list(vectors)
    for feature, of_id in vectors.items():
        torch.testing.assert_close(found[feature].values(), of_id[batch[feature].values()], msg=feature)
        assert torch.equal(found[feature].lengths(), batch[feature].lengths())
        indices = found[feature].weights_or_none()
        assert indices is None or torch.equal(indices, batch[feature].values())
        assert (indices is not None) == need_indices
    found["f1"].values().sum().backward()
    assert new.embeddings["t1"].weight.grad.abs().sum() > 0
