"""compress(): the same model from outside, fewer rows inside; wrong tables are refused and nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.compression.collections import CompressedEmbeddingBagCollection
from recpress.modules.compression.replace import compress
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import warm_rows
from tests.ranks import run_on_ranks

DIM, IDS = 8, 40
FEATURES = {"t0": ["f0"], "t1": ["f1", "f1b"], "t2": ["f2"], "t3": ["f3"]}


def id_map(
    num_rows: int = 10, rows_per_id: int = 1, weighted: bool = False, num_ids: int = IDS, seed: int = 0
) -> IdMap:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, num_rows, (num_ids, rows_per_id)).astype(np.int32))
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (num_ids, rows_per_id)).astype(np.float32)) if weighted else None
    return IdMap(rows=rows, num_rows=num_rows, weights=weights)


def one_row_each(num_ids: int = IDS) -> IdMap:
    """Each id has a row of its own, in another order: compression that loses nothing."""
    rows = torch.randperm(num_ids, generator=torch.Generator().manual_seed(3)).int()[:, None]
    return IdMap(rows=rows, num_rows=num_ids)


def collection(dim: int = DIM, pooling: PoolingType = PoolingType.SUM, **options: Any) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=t, num_embeddings=IDS, embedding_dim=dim, feature_names=list(f), pooling=pooling)
            for t, f in FEATURES.items()
        ],
        **options,
    )


def dlrm(kind: str = "dlrm", device: str = "cpu") -> nn.Module:
    tables = collection(device=torch.device(device))
    common = {"dense_in_features": 3, "dense_arch_layer_sizes": [8, DIM], "over_arch_layer_sizes": [8, 1]}
    if kind == "dcn":
        return DLRM_DCN(tables, dcn_num_layers=1, dcn_low_rank_dim=4, **common)
    return DLRM(tables, **common)


def made(seed: int = 0, rows: int = 4, weights: bool = False) -> KeyedJaggedTensor:
    rng = np.random.default_rng(seed)
    keys = ["f3", "f1b", "f0", "f2", "f1"]
    lengths = torch.from_numpy(rng.integers(0, 4, len(keys) * rows).astype(np.int32))
    values = torch.from_numpy(rng.integers(0, IDS, int(lengths.sum())))
    given = torch.from_numpy(rng.random(len(values)).astype(np.float32)) if weights else None
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=given)


def bags(kjt: KeyedJaggedTensor, feature: str, vectors: torch.Tensor, mean: bool = False) -> torch.Tensor:
    """Pooled vectors, bag by bag, from one vector for each id."""
    pooled = []
    for ids in kjt[feature].to_dense():
        bag = vectors[ids].sum(0)
        pooled.append(bag / max(1, len(ids)) if mean else bag)
    return torch.stack(pooled)


@pytest.mark.parametrize("kind", ["dlrm", "dcn"])
def test_a_dlrm_whose_ids_keep_rows_of_their_own_says_the_same(kind: str) -> None:
    model, dense = dlrm(kind), torch.randn(4, 3)
    want = model(dense, made())
    found, report = compress(
        model, {"t0": one_row_each(), "t1": one_row_each()}, frozen={"t2": source(), "t3": source()}
    )
    assert found is model
    vectors = copy.deepcopy(dlrm(kind))
    for table in ("t2", "t3"):
        vectors.sparse_arch.embedding_bag_collection.embedding_bags[table].weight.data.copy_(source())
    vectors.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "arch" in k and "bag" not in k}, strict=False
    )
    torch.testing.assert_close(model(dense, made()), vectors(dense, made()))
    assert not torch.equal(want, model(dense, made()))
    assert report.tables[0].rows_after == IDS


def source(rows: int = IDS, dim: int = DIM) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).normal(size=(rows, dim)).astype(np.float32))


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


def test_rows_are_the_count_weighted_mean_of_their_ids() -> None:
    one = IdMap(rows=torch.tensor([[0], [0], [2], [2]], dtype=torch.int32), num_rows=3)
    old = torch.tensor([[1.0], [4.0], [5.0], [7.0]])
    rows, used = warm_rows(old, one, torch.tensor([1.0, 3.0, 0.0, 0.0]))
    assert rows.tolist() == [[3.25], [0.0], [6.0]]  # (1 + 3 * 4) / 4; none; no counts, so alike
    assert used.tolist() == [True, False, True]
    # An id alone with its two weighted rows gets its own vector back: 1 * r0 + 2 * r1 = 10.
    weights = torch.tensor([[1.0, 2.0]])
    alone = IdMap(rows=torch.tensor([[0, 1]], dtype=torch.int32), num_rows=2, weights=weights)
    assert warm_rows(torch.tensor([[10.0]]), alone)[0].flatten().tolist() == [2.0, 4.0]


def test_a_stride_for_each_key_is_refused_by_frozen_tables() -> None:
    model, _ = compress(collection(), {}, {"t0": source()})
    features = KeyedJaggedTensor(
        keys=["f0", "f1", "f1b", "f2", "f3"],
        values=torch.zeros(6, dtype=torch.int64),
        lengths=torch.ones(6, dtype=torch.int32),
        stride_per_key_per_rank=[[2], [1], [1], [1], [1]],
        inverse_indices=(["f0", "f1", "f1b", "f2", "f3"], torch.tensor([[0, 1], *[[0, 0]] * 4])),
    )
    with pytest.raises(ValueError, match="different stride for each key"):
        model(features)


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
    with pytest.raises(ValueError, match="one unweighted row"):
        compress(nn.ModuleList([EmbeddingCollection(configs)]), {"t0": id_map(rows_per_id=2)})
    with pytest.raises(ValueError, match="frozen tables need an EmbeddingBagCollection"):
        compress(nn.ModuleList([EmbeddingCollection(configs)]), {}, {"t0": source(dim=4)})
    with pytest.raises(ValueError, match="need_indices"):
        compress(nn.ModuleList([EmbeddingCollection(configs, need_indices=True)]), {"t0": id_map()})


def test_what_is_not_named_stays_the_same_module() -> None:
    tables = collection()
    kept = tables.embedding_bags["t0"].weight
    model = nn.ModuleDict({"one": tables, "again": tables})
    compress(model, {"t1": id_map()})
    assert model["one"] is model["again"]
    assert model["one"].trainable.embedding_bags["t0"].weight is kept


def test_the_report() -> None:
    model = dlrm()
    frozen = {"t2": source(), "t3": source()}
    _, report = compress(model, {"t0": id_map(10), "t3": id_map(5)}, frozen, storage="int8", packed=True)
    by_table = {t.table: t for t in report.tables}
    assert {k: (t.kind, t.rows_before, t.rows_after) for k, t in by_table.items()} == {
        "t0": ("shared", IDS, 10),
        "t2": ("frozen", IDS, IDS),
        "t3": ("frozen, shared", IDS, 5),
    }
    assert [t.bytes_after for t in report.tables] == [10 * DIM * 4, IDS * (DIM + 8), 5 * (DIM + 8)]
    assert [t.map_bytes for t in report.tables] == [IDS * 4 // 8, 0, IDS * 3 // 8]
    compressed = model.sparse_arch.embedding_bag_collection
    assert compressed.frozen.storage_bytes() == sum(t.bytes_after for t in report.tables[1:])
    lines = str(report).splitlines()
    assert lines[1].split() == ["t0", "shared", "40", "10", "1,280", "320", "20"]
    assert lines[-1] == "bytes kept, maps included: 28.0 %"


def test_frozen_rows_of_four_bits_are_near_and_count_their_scales() -> None:
    model, features = dlrm(), {"t2": source()}
    _, report = compress(model, {"t2": id_map(10)}, features, storage="int4")
    (table,) = report.tables
    assert table.bytes_after == 10 * (DIM // 2 + 4)
    frozen = model.sparse_arch.embedding_bag_collection.frozen
    ((_, decoded),) = frozen.decoded("t2")
    want = warm_rows(source(), id_map(10))[0]
    assert float((decoded[:, : want.shape[1]] - want).abs().max()) <= float((want.amax(1) - want.amin(1)).max()) / 25


def test_wrong_tables_are_refused_and_nothing_is_changed() -> None:
    model = dlrm()
    tables = model.sparse_arch.embedding_bag_collection
    one, fine = id_map(), {"t0": id_map()}
    bad = source().index_fill(0, torch.tensor(3), torch.nan)
    mean = collection(pooling=PoolingType.MEAN)
    weighted_mean = collection(pooling=PoolingType.MEAN, is_weighted=True)
    twice = nn.ModuleList([collection(), collection()])
    shared_feature = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=n, num_embeddings=IDS, embedding_dim=4, feature_names=["f0"]) for n in ("a", "b")]
    )
    cases: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("no table 'item'; it has t0, t1, t2, t3", model, {"item": one}, {}),
        ("it has none", nn.Linear(1, 1), {"item": one}, {}),
        ("neither maps nor frozen", model, {}, {}),
        ("'t0': its map has 7 ids, expected 40", model, {"t0": id_map(num_ids=7)}, {}),
        ("'t2': source has 5 rows, expected 40", model, fine, {"frozen": {"t2": source(5)}}),
        ("'t2': source has dimension 30, expected 8", model, fine, {"frozen": {"t2": source(dim=30)}}),
        ("'t2': row 3 of the source holds NaN", model, fine, {"frozen": {"t2": bad}}),
        ("'t0': counts have shape", model, fine, {"counts": {"t0": torch.ones(3)}}),
        ("'t0': counts hold a negative", model, fine, {"counts": {"t0": -torch.ones(IDS)}}),
        ("'t1': there are counts for it, but no map", model, fine, {"counts": {"t1": torch.ones(IDS)}}),
        ("storage is 'int2'", model, fine, {"storage": "int2"}),
        ("two collections, 0 and 1", twice, fine, {}),
        ("feature 'f0': it looks up in the tables 'a' and 'b'", shared_feature, {"a": one}, {}),
        ("mean pooling does not support per-sample weights", mean, {"t0": id_map(weighted=True)}, {}),
        ("mean pooling does not support .* its collection", weighted_mean, {}, {"frozen": {"t0": source()}}),
        ("'t0': its rows are on the device 'meta'", dlrm(device="meta"), fine, {}),
    ]  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for message, subject, maps, options in cases:
        with pytest.raises(ValueError, match=message):
            compress(subject, maps, **options)
    assert model.sparse_arch.embedding_bag_collection is tables
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_optimizer_in_the_backward_pass_is_refused() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    tables = collection()
    _apply_optimizer_in_backward(torch.optim.SGD, tables.embedding_bags["t0"].parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match="'t0': its backward pass already applies an optimizer"):
        compress(nn.ModuleList([tables]), {"t0": id_map()})
    compress(nn.ModuleList([tables]), {"t1": id_map()})  # that of another table is kept
    assert hasattr(tables.embedding_bags["t0"].weight, "_in_backward_optimizers")


def test_collections_behind_other_modules_of_torchrec_are_refused() -> None:
    from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

    processed = FeatureProcessedEmbeddingBagCollection(
        collection(is_weighted=True), PositionWeightedModuleCollection({f: 4 for fs in FEATURES.values() for f in fs})
    )
    with pytest.raises(ValueError, match="behind FeatureProcessedEmbeddingBagCollection"):
        compress(nn.ModuleList([processed]), {"t0": id_map()})


def test_quantized() -> None:
    model, dense = dlrm(), torch.randn(4, 3)
    compress(model, {"t0": id_map(), "t1": id_map(rows_per_id=2)}, {"t2": source()})
    want = model(dense, made())
    quantized = quantize_inference_model(copy.deepcopy(model))
    assert "quant" in type(quantized.sparse_arch.embedding_bag_collection.trainable).__module__
    torch.testing.assert_close(quantized(dense, made()), want, atol=0.03, rtol=0.03)


class Train(nn.Module):
    """A DLRM and its loss; takes one KeyedJaggedTensor as batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dense = nn.Parameter(torch.ones(1, 3))

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(self.dense.expand(4, 3), features)
        return (logits**2).mean(), logits.detach()


def compressed(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    maps = {"t0": id_map(12, rows_per_id=2), "t1": id_map(10), "t3": id_map(9)}
    model, report = compress(Train(dlrm(kind)), maps, {"t2": source(), "t3": source()})
    return model, report


def sharded_and_pipelined() -> None:
    import torch.distributed as dist
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from recpress.trainer.model.sharding import shard

    device, rank = torch.device("cpu"), dist.get_rank()
    for kind, layout in (("dlrm", "row_wise"), ("dcn", "table_wise"), ("dlrm", "column_wise")):
        plain, _ = compressed(kind)
        want = plain(made(rank))[1]
        outs = []
        for pipelined in (False, True):
            model, report = compressed(kind)
            layouts = {t: layout for t in FEATURES}
            model = shard(model, device, batch_size=4, sharding_types=layouts, learning_rate=0.1)
            report.load(model)
            with torch.no_grad():
                torch.testing.assert_close(model(made(rank))[1], want)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if pipelined:
                pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)
                batches = iter([made(10 * step + rank) for step in range(4)])
                outs.append(torch.stack([pipeline.progress(batches) for _ in range(4)]))
                assert len(pipeline._pipelined_modules) == 2  # the trainable and the frozen tables
                assert [type(p.postproc_module) for p in pipeline._pipelined_postprocs] == [LearnedHash]
            else:
                steps = []
                for step in range(4):
                    optimizer.zero_grad()
                    loss, out = model(made(10 * step + rank))
                    loss.backward()
                    optimizer.step()
                    steps.append(out)
                outs.append(torch.stack(steps))
        assert not torch.equal(outs[0][0], outs[0][3])
        torch.testing.assert_close(outs[0], outs[1])
    with pytest.raises(ValueError, match="is already sharded"):
        compress(model, {"t0": id_map()})


def test_sharded_and_pipelined() -> None:
    run_on_ranks(sharded_and_pipelined, 2)


def test_rows_that_were_not_there_cannot_be_loaded() -> None:
    model, report = compress(dlrm(device="meta"), {"t0": id_map()}, {"t2": source()}, warm_start=False)
    assert set(report.rows) == {"t2"}
    with pytest.raises(ValueError, match="'t0': it had no rows"):
        report.load(model)
    with pytest.raises(ValueError, match="no compressed collection"):
        report.load(dlrm())
