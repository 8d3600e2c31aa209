"""compress(): the same model from outside, fewer rows inside; wrong tables are refused and nothing is changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, fuse_embedding_optimizer

from recpress.modules.compression.replace import compress
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import warm_rows
from tests.modules.compression.model_cases import (
    DIM,
    FEATURES,
    IDS,
    collection,
    compressed,
    dlrm,
    id_map,
    made,
    one_row_each,
    source,
)
from tests.ranks import run_on_ranks


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


def test_what_is_not_named_stays_the_same_module() -> None:
    tables = collection()
    kept = tables.embedding_bags["t0"].weight
    model = nn.ModuleDict({"one": tables, "again": tables})
    compress(model, {"t1": id_map()})
    assert model["one"] is model["again"]
    assert model["one"].trainable.embedding_bags["t0"].weight is kept


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
        ("two collections have it, 0 and 1", twice, fine, {}),
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


def test_an_optimizer_in_the_backward_pass_moves_to_the_new_table() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    tables = collection()
    options = {"lr": 0.1}
    _apply_optimizer_in_backward(torch.optim.SGD, tables.embedding_bags.parameters(), options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model := nn.ModuleList([tables]), {"t0": id_map()}, {"t2": source()})
    for table in ("t0", "t1"):
        weight = model[0].embedding_bags[table].weight
        assert (weight._optimizer_classes, weight._optimizer_kwargs) == ([torch.optim.SGD], [options])
        before = weight.detach().clone()
        model[0](made()).values().sum().backward()
        assert weight.grad is None
        assert not torch.equal(before, weight)


def test_an_optimizer_from_before_warns() -> None:
    model = dlrm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="SGD was created before.*table 't0'"):
        compress(model, {"t0": id_map()})
    assert optimizer.param_groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(dlrm(), {"t0": id_map()})  # that of another model


def test_collections_behind_other_modules_of_torchrec_are_refused() -> None:
    processed = FeatureProcessedEmbeddingBagCollection(
        collection(is_weighted=True), PositionWeightedModuleCollection({f: 4 for fs in FEATURES.values() for f in fs})
    )
    for maps, frozen in (({"t0": id_map(rows_per_id=2)}, {}), ({}, {"t0": source()})):
        with pytest.raises(ValueError, match="'t0': it is behind FeatureProcessedEmbeddingBagCollection"):
            compress(nn.ModuleList([processed]), maps, frozen)

    class OfIds(PositionWeightedModuleCollection):
        """May treat ids in its own way."""

    other = FeatureProcessedEmbeddingBagCollection(
        collection(is_weighted=True), OfIds({f: 4 for fs in FEATURES.values() for f in fs})
    )
    with pytest.raises(ValueError, match="behind FeatureProcessedEmbeddingBagCollection"):
        compress(nn.ModuleList([other]), {"t0": id_map()})


def test_position_weights_with_one_row_maps() -> None:
    def model() -> nn.Module:
        lengths = {f: 4 for fs in FEATURES.values() for f in fs}
        torch.manual_seed(0)
        processors = PositionWeightedModuleCollection(lengths)
        for weights in processors.position_weights.values():
            nn.init.uniform_(weights)
        return nn.ModuleDict({"x": FeatureProcessedEmbeddingBagCollection(collection(is_weighted=True), processors)})

    plain, new = model(), model()
    before = plain.state_dict()
    compress(new, {"t0": one_row_each(), "t1": one_row_each()})
    torch.testing.assert_close(new["x"](made()).values(), plain["x"](made()).values())
    after = {key: value for key, value in new.state_dict().items() if "fingerprint" not in key}
    assert after.keys() == before.keys()
    new.load_state_dict(after)
    compress(smaller := model(), {"t0": id_map(10)})
    assert smaller.state_dict()["x._embedding_bag_collection.embedding_bags.t0.weight"].shape == (10, DIM)


def test_tables_in_modules_that_compress_does_not_take_are_named() -> None:
    fused = FusedEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t0", num_embeddings=IDS, embedding_dim=4, feature_names=["f0"])],
        optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1},
    )  # fmt: skip

    class Sub(EmbeddingBagCollection):
        pass

    sub = Sub([EmbeddingBagConfig(name="t0", num_embeddings=IDS, embedding_dim=4, feature_names=["f0"])])
    bag = nn.EmbeddingBag(IDS, 4)
    compressed_before, _ = compress(collection(), {"t1": id_map()})
    for kind, subject in {
        "FusedEmbeddingBagCollection": nn.ModuleDict({"x": fused}),
        "Sub": nn.ModuleDict({"x": sub}),
        "EmbeddingBag": nn.ModuleDict({"t0": bag}),
        "CompressedEmbeddingBagCollection": nn.ModuleDict({"x": compressed_before}),
    }.items():
        with pytest.raises(ValueError, match=f"table 't[01]'.* (is a|is already compressed, by) {kind}"):
            compress(subject, {"t1" if "Compressed" in kind else "t0": id_map()})
    with pytest.raises(ValueError, match="fuse_embedding_optimizer would drop the maps"):
        fuse_embedding_optimizer(
            nn.ModuleDict({"x": compressed_before}), torch.optim.SGD, {"lr": 0.1}, torch.device("cpu")
        )


def test_quantized() -> None:
    model, dense = dlrm(), torch.randn(4, 3)
    compress(model, {"t0": id_map(), "t1": id_map(rows_per_id=2)}, {"t2": source()})
    want = model(dense, made())
    quantized = quantize_inference_model(copy.deepcopy(model))
    assert "quant" in type(quantized.sparse_arch.embedding_bag_collection.trainable).__module__
    torch.testing.assert_close(quantized(dense, made()), want, atol=0.03, rtol=0.03)


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
                with pytest.warns(UserWarning, match="pass pipeline_postproc=True"):
                    TrainPipelineSparseDist(model, optimizer, device).progress(iter([made(rank)]))
        assert not torch.equal(outs[0][0], outs[0][3])
        torch.testing.assert_close(outs[0], outs[1])
    with pytest.raises(ValueError, match="is already compressed"):
        compress(model, {"t0": id_map()})


def test_sharded_and_pipelined() -> None:
    run_on_ranks(sharded_and_pipelined, 2)


def test_one_frozen_table_may_be_named_alone() -> None:
    with pytest.raises(ValueError, match="table 't_cat_3': it is frozen, but `rows` has no rows of it"):
        compress(dlrm("dlrm"), {}, "t_cat_3")
    _, report = compress(dlrm("dlrm"), {}, "t2", rows={"t2": source()})
    assert [change.table for change in report.tables] == ["t2"]
