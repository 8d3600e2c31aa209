"""Frozen tables: plain and sharded give the same rows, stored in the bits that were asked for."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRM_DCN

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable
from recpress.modules.frozen.sequence import FrozenEmbeddingCollection
from recpress.modules.id_check import check_ids
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda, without_waiting
from tests.modules.frozen.table_cases import STORAGES, check, features, load, tables
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


WIDTHS = {"fp32": 4 * 256, "fp16": 2 * 256, "int8": 256 + 8, "int4": 128 + 4}
"""Bytes of a row of 256 values."""


class OverTables(nn.Module):
    """The least model that DistributedModelParallel and a backward pass take."""

    def __init__(self, storage, device, weighted=False):
        super().__init__()
        self.frozen = FrozenEmbeddingBagCollection(tables(storage), device=device, weighted=weighted)
        self.top = nn.Linear(256, 1)

    def forward(self, batch):
        return self.top(self.frozen(batch)["x@a"]).sum()


@pytest.mark.parametrize("storage", STORAGES)
def test_plain(storage):
    collection = FrozenEmbeddingBagCollection(tables(storage))
    load(collection)
    check(collection(features()), storage)
    assert not list(collection.parameters())
    assert {name: value.shape for name, value in collection.state_dict().items()} == {
        "fingerprint.a": (11,),
        "fingerprint.b": (7,),
    }
    assert collection.storage_bytes() == 11 * WIDTHS[storage] + 7 * 4 * 8


def weighted_features():
    """Bags of two, one and no ids, and weights."""
    return KeyedJaggedTensor(
        ["x", "y"],
        torch.tensor([1, 6, 3, 5, 0, 6]),
        lengths=torch.tensor([2, 1, 0, 0, 2, 1], dtype=torch.int32),
        weights=torch.tensor([0.5, 2.0, -1.0, 3.0, 0.25, 1.0]),
    )


def weighted_sums(storage):
    """What the weighted collection gives for these, from the rows as they are stored."""
    plain = FrozenEmbeddingBagCollection(tables(storage))
    load(plain)
    a, b = (plain.decoded(name)[0][1] for name in ("a", "b"))
    return {
        "x@a": torch.stack([0.5 * a[1] + 2 * a[6], -a[3], 0 * a[0]]),
        "x@b": torch.stack([0.5 * b[1] + 2 * b[6], -b[3], 0 * b[0]]),
        "y": torch.stack([0 * b[0], 3 * b[5] + 0.25 * b[0], b[6]]),
    }


def sharded(layout):
    from recpress.trainer.model.sharding import shard

    found = []
    for storage in STORAGES:
        if storage in ("int8", "int4") and layout == "column_wise":
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
        fingerprints = {"frozen.fingerprint.a", "frozen.fingerprint.b"}
        assert set(model.state_dict()) == {"top.weight", "top.bias"} | fingerprints
        found.append(model.module.frozen.storage_bytes())
        check_weights_travel(storage, layout)
    return found


def check_weights_travel(storage, layout):
    from recpress.trainer.model.sharding import shard

    model = shard(
        OverTables(storage, "meta", weighted=True), CPU, batch_size=4, sharding_types=dict.fromkeys("ab", layout)
    )
    load(model.module.frozen)
    found = model.module.frozen(weighted_features()).wait()
    for key, want in weighted_sums(storage).items():
        torch.testing.assert_close(found[key], want, rtol=1e-5, atol=1e-5)


def all_layouts():
    return {layout: sharded(layout) for layout in ("row_wise", "table_wise", "column_wise", "table_row_wise")}


@pytest.mark.parametrize("world", [1, 2])
def test_sharded(world):
    ranks = run_on_ranks(all_layouts, world)
    for layout in ranks[0]:
        per_rank = [rank[layout] for rank in ranks]
        whole = [11 * width + 7 * 4 * 8 for width in WIDTHS.values()]
        assert [sum(each) for each in zip(*per_rank, strict=True)] == whole[: len(per_rank[0])]
        if world == 2 and layout != "table_wise":
            assert max(each[0] for each in per_rank) <= 0.6 * whole[0]  # no rank holds a whole table


@pytest.mark.parametrize("storage", STORAGES)
def test_per_sample_weights(storage):
    collection = FrozenEmbeddingBagCollection(tables(storage), weighted=True)
    load(collection)
    found = collection(weighted_features())
    for key, want in weighted_sums(storage).items():
        torch.testing.assert_close(found[key], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="lack per-sample weights"):
        collection(features())


def test_weights_are_ignored_where_none_were_announced():
    collection = FrozenEmbeddingBagCollection(tables("fp32"))
    load(collection)
    ones = weighted_features()
    bare = KeyedJaggedTensor(ones.keys(), ones.values(), lengths=ones.lengths())
    assert torch.equal(collection(ones).values(), collection(bare).values())


def lookup(storage, ids, **options):
    collection = FrozenEmbeddingBagCollection([FrozenTable(name="t", rows=10, dim=8, features=("f",), storage=storage)])
    collection.load("t", np.arange(80, dtype=np.float32).reshape(10, 8))
    return collection(KeyedJaggedTensor(["f"], ids, lengths=torch.tensor([len(ids)])))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_an_id_out_of_range_is_refused_in_every_storage(storage, bad):
    assert lookup(storage, torch.tensor([0, 9])).values().shape == (1, 8)
    with pytest.raises(ValueError, match=rf"table 't'.*'f'.*{bad}, expected 0 to 9"):
        lookup(storage, torch.tensor([3, bad, 4]))


@pytest.mark.parametrize("ids", [torch.tensor([1.7]), torch.tensor([True]), torch.tensor([1], dtype=torch.uint64)])
def test_ids_that_are_no_signed_integers_are_refused(ids):
    with pytest.raises(ValueError, match=r"'f' are torch.*expected torch.int64"):
        lookup("fp32", ids)


def test_a_feature_that_the_batch_lacks_is_named():
    collection = FrozenEmbeddingBagCollection([FrozenTable(name="t", rows=10, dim=8, features=("q",))])
    collection.load("t", np.ones((10, 8), np.float32))
    with pytest.raises(ValueError, match=r"'t'.*no feature 'q'.*x, y"):
        collection(features())


def test_tables_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="'t' is repeated"):
        FrozenEmbeddingBagCollection([FrozenTable(name="t", rows=2, dim=4, features=(f,)) for f in "ab"])
    with pytest.raises(ValueError, match="no table, expected"):
        FrozenEmbeddingBagCollection([])
    with pytest.raises(ValueError, match=r"no frozen table .u.; expected one of a, b"):
        FrozenEmbeddingBagCollection(tables("fp32")).load("u", np.ones((2, 4), np.float32))


def bad_uses():
    from recpress.trainer.model.sharding import shard

    said = []
    for layout in ("row_wise", "table_wise"):
        model = shard(OverTables("int4", "meta"), CPU, batch_size=4, sharding_types=dict.fromkeys("ab", layout))
        with pytest.raises(ValueError, match="never loaded") as unloaded:
            model(features())
        load(model.module.frozen)
        for bad in (11, -1):  # 11 of 11 rows: not of the last shard either
            ids = KeyedJaggedTensor(["x", "y"], torch.tensor([bad, 0]), lengths=torch.ones(2, dtype=torch.int32))
            with pytest.raises(ValueError, match=f"id {bad}, expected 0 to 6"):
                model(ids)
        check(model.module.frozen(features()), "int4")
        said.append(str(unloaded.value))
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_sharded_tables_refuse_on_every_rank(world):
    ranks = run_on_ranks(bad_uses, world)
    assert all("'a'" in text for rank in ranks for text in rank)


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN])
def test_in_a_model_of_torchrec(kind):
    """TorchRec's models take a frozen collection as they take a trainable one with the same rows."""
    features = {"a": ["f0"], "b": ["f1", "f2"]}
    rows = {name: torch.randn(9, 8, generator=torch.Generator().manual_seed(len(f))) for name, f in features.items()}
    plain = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=n, num_embeddings=9, embedding_dim=8, feature_names=f) for n, f in features.items()]
    )
    frozen = FrozenEmbeddingBagCollection(
        [FrozenTable(name=n, rows=9, dim=8, features=tuple(f)) for n, f in features.items()]
    )
    for name, values in rows.items():
        plain.embedding_bags[name].weight.data.copy_(values)
        frozen.load(name, values)
    batch = KeyedJaggedTensor(["f0", "f1", "f2"], torch.arange(9), lengths=torch.tensor([2, 1, 0, 3, 1, 2]))
    more = {"dcn_num_layers": 1, "dcn_low_rank_dim": 4} if kind is DLRM_DCN else {}
    outputs = []
    for bags in (plain, frozen):
        assert isinstance(bags, EmbeddingBagCollection)
        torch.manual_seed(0)
        outputs.append(kind(bags, 3, [8], [4, 1], **more)(torch.ones(2, 3), batch))
    torch.testing.assert_close(*outputs)
    names = [[(c.name, c.feature_names) for c in t.embedding_bag_configs()] for t in (plain, frozen)]
    assert names[0] == names[1]
    assert not frozen.is_weighted()


@pytest.mark.parametrize("storage", STORAGES)
def test_on_a_gpu_an_id_out_of_range_is_found_later(storage, monkeypatch):
    """There it looks up row 0 until `check_ids` raises, so that no step waits for the ids."""
    monkeypatch.setattr("recpress.modules.frozen.kernel.host_reads", lambda ids: False)
    collection = FrozenEmbeddingBagCollection(tables(storage))
    load(collection)
    check(collection(features()), storage)
    check_ids(collection)
    bad = KeyedJaggedTensor(["y", "x"], torch.tensor([6, 1, 2, 7]), lengths=torch.ones(4, dtype=torch.int32))
    found = collection(bad)
    assert torch.equal(found["x@b"][1], collection.decoded("b")[0][1][0])
    with pytest.raises(ValueError, match="table 'b': feature 'x' has the id 7, expected 0 to 6"):
        check_ids(collection)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["pooled", "weighted", "sequence"])
def test_on_cuda_no_lookup_waits(storage, kind):
    given = tables(storage)
    with fake_cuda():
        if kind == "sequence":
            collection = FrozenEmbeddingCollection(given[:1], device=CUDA)
        else:
            collection = FrozenEmbeddingBagCollection(given, device=CUDA, weighted=kind == "weighted")
        collection._loaded = {table.name for table in given}
        weights = torch.empty(9, device=CUDA) if kind == "weighted" else None
        batch = KeyedJaggedTensor(
            ["y", "x"], cuda_ids(9), weights, cuda_ids(8, torch.int32), stride=4, length_per_key=[4, 5]
        )
        found = without_waiting(lambda: collection(batch))
        if kind == "sequence":
            assert found["x"].values().shape == (5, 256)
        else:
            assert found["x@a"].shape == (4, 256)
            assert found["y"].device == CUDA


@pytest.mark.parametrize("storage", STORAGES)
def test_lookups_on_a_device(storage, device):
    collection = FrozenEmbeddingBagCollection(tables(storage), device=device)
    load(collection)
    found = collection(features().to(device))
    check({key: found[key].cpu() for key in found.keys()}, storage)  # noqa: SIM118 (of a KeyedTensor)
    check_ids(collection)
