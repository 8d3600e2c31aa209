"""A baked model is a plain TorchRec model: same outputs, all rows, no fingerprints, quantizable, shardable."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.compression.replace import compress
from recpress.modules.compression.sharders import sharders
from recpress.modules.fingerprints import is_fingerprint
from tests.modules.compression.model_cases import DIM, FEATURES, IDS, collection, dlrm, id_map, made, source
from tests.ranks import run_on_ranks

TABLES = "sparse_arch.embedding_bag_collection"


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", "int4"])
def test_a_dlrm(storage: Any) -> None:
    maps = {"t0": id_map(10, rows_per_id=2, weighted=True), "t3": id_map(7, seed=1)}
    model, report = compress(dlrm(), maps, {"t2": source(), "t3": source()}, storage=storage)
    kept = copy.deepcopy(model)
    baked = report.bake(model)
    dense = torch.ones(4, 3)
    torch.testing.assert_close(baked(dense, made()), model(dense, made()))
    found = baked.sparse_arch.embedding_bag_collection
    assert type(found.tables) is EmbeddingBagCollection
    state = {name: value.clone() for name, value in baked.state_dict().items()}
    assert not any(is_fingerprint(name) for name in state)
    shapes = {t: tuple(state[f"{TABLES}.tables.embedding_bags.{t}.weight"].shape) for t in FEATURES}
    assert shapes == {"t0": (10, DIM), "t1": (IDS, DIM), "t2": (IDS, DIM), "t3": (7, DIM)}
    of_t2 = model.sparse_arch.embedding_bag_collection.frozen.decoded("t2")[0][1]
    assert torch.equal(state[f"{TABLES}.tables.embedding_bags.t2.weight"], of_t2)
    assert state[f"{TABLES}.maps.rows"].numel() == 3 * IDS
    with torch.no_grad():  # a copy: the model does not change with it
        for parameter in baked.parameters():
            parameter.add_(1)
    torch.testing.assert_close(model(dense, made()), kept(dense, made()))
    other = compress(dlrm(), maps, {"t2": source(), "t3": source()}, storage=storage)
    again = other[1].bake(other[0])
    again.load_state_dict(state)  # the state dict is complete, so a new process needs nothing else
    torch.testing.assert_close(again(dense, made()), model(dense, made()), rtol=1e-4, atol=1e-4)


def test_without_maps_it_is_the_plain_collection() -> None:
    plain = collection(6, PoolingType.MEAN)
    rows = {t: plain.embedding_bags[t].weight.detach().clone() for t in FEATURES}
    want, names = plain(made()).values(), set(plain.state_dict())
    model, report = compress(plain, {}, {t: rows[t] for t in ("t1", "t3")})
    baked = report.bake(model)
    assert type(baked) is EmbeddingBagCollection
    assert set(baked.state_dict()) == names
    torch.testing.assert_close(baked(made()).values(), want)
    assert {name.split(".")[1] for name, p in baked.named_parameters() if p.requires_grad} == {"t0", "t2"}


@pytest.mark.parametrize("maps", [{}, {"t1": id_map(12, rows_per_id=2, weighted=True), "t3": id_map(9)}])
def test_sequences(maps: Any) -> None:
    torch.manual_seed(0)
    configs = [
        EmbeddingConfig(name=t, num_embeddings=IDS, embedding_dim=6, feature_names=f) for t, f in FEATURES.items()
    ]
    old = nn.ModuleDict({"sequence": EmbeddingCollection(configs, need_indices=True)})
    model, report = compress(old, maps, {"t2": source(dim=6), "t3": source(dim=6)}, storage="int8")
    baked = report.bake(model)["sequence"]
    assert type(baked if not maps else baked.tables) is EmbeddingCollection
    want, found = model["sequence"](made()), baked(made())
    assert list(found) == list(want)
    for key, jagged in want.items():
        torch.testing.assert_close(found[key].values(), jagged.values())
        assert torch.equal(found[key].weights(), jagged.weights())


def test_it_can_be_quantized_as_torchrecs_own() -> None:
    model, report = compress(dlrm(), {"t0": id_map(10)}, {"t2": source()})
    dense = torch.ones(4, 3)
    quantized = quantize_inference_model(report.bake(model))
    assert "quant" in type(quantized.sparse_arch.embedding_bag_collection.tables).__module__
    torch.testing.assert_close(quantized(dense, made()), model(dense, made()), rtol=0.05, atol=0.01)


def test_rows_that_were_never_loaded() -> None:
    model, report = compress(dlrm(device="meta"), {"t0": id_map()}, {"t2": source()}, warm_start=False)
    with pytest.raises(ValueError, match=r"t2.*never loaded"):
        report.bake(model)
    model, report = compress(dlrm(device="meta"), {"t0": id_map()}, warm_start=False)
    with pytest.raises(ValueError, match=r"t0.*meta"):
        report.bake(model)
    with pytest.raises(ValueError, match="no compressed collection"):
        report.bake(dlrm())
    model, report = compress(dlrm(), {"t0": id_map()}, {"t2": source()})
    with pytest.raises(ValueError, match="embedding_bag_collection is quantized"):
        report.bake(quantize_inference_model(model))


def compressed_dlrm(device: str = "cpu") -> Any:
    return compress(dlrm(), {"t0": id_map(10, rows_per_id=2)}, {"t2": source()}, storage="int8")


def _gather(folder: str) -> None:
    """Sharded models are gathered as the error says."""
    model, report = compressed_dlrm()
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), sharders=sharders())
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint"):
        report.bake(sharded)
    dense = torch.ones(4, 3)
    want = sharded(dense, made())
    dcp.save(sharded.state_dict(), checkpoint_id=folder)
    again, report = compressed_dlrm()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    state = again.state_dict()
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state)
    torch.testing.assert_close(report.bake(again)(dense, made()), want)


def test_a_sharded_model(tmp_path: Path) -> None:
    run_on_ranks(_gather, 2, str(tmp_path / "checkpoint"))
