"""The map as TorchRec's collision module: the rows of LearnedHash, sharded, and saved on other ranks than loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.managed_collision import LearnedCollisionModule
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda, without_waiting
from tests.ranks import run_on_ranks

DIM = 4
TABLES = {"t0": (30, 10, ["a"]), "t1": (50, 7, ["b", "c"])}
"""Name -> ids, rows, features; neither number of rows is a multiple of 2 and 3 ranks."""


def id_map(name: str) -> IdMap:
    ids, rows, _ = TABLES[name]
    values = np.random.default_rng(ids).integers(0, rows, (ids, 1))
    return IdMap(rows=torch.from_numpy(values.astype(np.int32)), num_rows=rows)


def configs() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=n, num_embeddings=rows, embedding_dim=DIM, feature_names=list(features))
        for n, (_, rows, features) in TABLES.items()
    ]


def weights(name: str) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(TABLES[name][1], DIM)).astype(np.float32))


def fill(collection: Any) -> None:
    for name in TABLES:
        collection.load_state_dict({f"embedding_bags.{name}.weight": weights(name)}, strict=False)


def batch(rank: int) -> KeyedJaggedTensor:
    rng = np.random.default_rng(rank)
    lengths = torch.from_numpy(rng.integers(0, 4, 3 * 5).astype(np.int32))
    ids = torch.from_numpy(rng.integers(-2, 55, int(lengths.sum())))  # some are of no map
    return KeyedJaggedTensor(keys=["c", "a", "b"], values=ids, lengths=lengths)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        specs = configs()
        tables = EmbeddingBagCollection(specs)
        collisions = ManagedCollisionCollection({n: LearnedCollisionModule(id_map(n)) for n in TABLES}, specs)
        self.tables = ManagedCollisionEmbeddingBagCollection(tables, collisions, return_remapped_features=True)

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, KeyedJaggedTensor]:
        pooled, rows = self.tables(features)
        return torch.cat([pooled[key] for key in ("a", "b", "c")], 1), rows


def expected(features: KeyedJaggedTensor) -> tuple[torch.Tensor, KeyedJaggedTensor]:
    """LearnedHash before the same tables."""
    maps = {feature: one for n, (_, _, names) in TABLES.items() for one in [id_map(n)] for feature in names}
    plain = EmbeddingBagCollection(configs())
    fill(plain)
    rows = LearnedHash(maps)(features)
    return plain(rows).values(), rows


def check(model: nn.Module, features: KeyedJaggedTensor) -> None:
    with torch.no_grad():
        found, rows = model(features)
        want, want_rows = expected(features)
    torch.testing.assert_close(found, want)
    for key in want_rows.keys():  # noqa: SIM118 (of a KeyedJaggedTensor)
        assert rows[key].values().tolist() == want_rows[key].values().tolist()


def test_plain() -> None:
    model = Model()
    fill(model.tables._embedding_module)
    check(model, batch(0))
    ids = batch(0).to_dict()
    for name, (num_ids, _, features) in TABLES.items():
        values = torch.cat([ids[f].values() for f in features])
        module = model.tables._managed_collision_collection._managed_collision_modules[name]
        assert module.unknown_count() == int(((values < 0) | (values >= num_ids)).sum()) > 0


def test_quantized() -> None:
    model = Model()
    fill(model.tables._embedding_module)
    want = model(batch(0))[0]
    quantized = quantize_inference_model(model)
    found = quantized(batch(0))[0]
    torch.testing.assert_close(found, want, atol=0.1, rtol=0.1)
    assert not torch.equal(found, want)


def test_maps_that_it_cannot_apply() -> None:
    two = IdMap(rows=torch.zeros(3, 2, dtype=torch.int32), num_rows=2)
    with pytest.raises(ValueError, match="2 rows per id and no weights, expected one row"):
        LearnedCollisionModule(two)
    weighted = IdMap(rows=torch.zeros(3, 1, dtype=torch.int32), num_rows=2, weights=torch.ones(3, 1))
    with pytest.raises(ValueError, match="1 rows per id and weights, expected one row and no weights"):
        LearnedCollisionModule(weighted)
    with pytest.raises(ValueError, match="'skip'"):
        LearnedCollisionModule(id_map("t0"), unknown="skip")  # type: ignore[arg-type]
    strict = ManagedCollisionCollection(
        {n: LearnedCollisionModule(id_map(n), unknown="error") for n in TABLES}, configs()
    )
    features = KeyedJaggedTensor(keys=["a", "b", "c"], values=torch.tensor([1, 2, 50]), lengths=torch.ones(3).int())
    with pytest.raises(ValueError, match="table 't1': the id 50, expected 0 to 49"):
        strict(features)


@pytest.mark.parametrize("unknown", ["hash", "error"])
def test_on_cuda_no_batch_waits(unknown: Any) -> None:
    module = LearnedCollisionModule(id_map("t0"), unknown=unknown)
    with fake_cuda():
        module.to(CUDA)
        features = {"t0": JaggedTensor(cuda_ids(7), lengths=cuda_ids(3))}
        found = without_waiting(lambda: module(features))
        assert (found["t0"].values().device, len(found["t0"].values())) == (CUDA, 7)


def on_ranks(folder: str, save: bool) -> None:
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
    from torchrec.distributed.mc_modules import ManagedCollisionCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingPlan

    from recpress.trainer.model.sharding import TableSharder

    device, rank = torch.device("cpu"), dist.get_rank()
    sharder = ManagedCollisionEmbeddingBagCollectionSharder(
        TableSharder("sgd", 0.0, 1e-8),
        ManagedCollisionCollectionSharder(),
    )
    model = Model()
    layout = construct_module_sharding_plan(
        model.tables,
        {name: row_wise(compute_kernel="fused") for name in TABLES},
        sharder,
        local_size=dist.get_world_size(),
        world_size=dist.get_world_size(),
        device_type="cpu",
    )
    sharded = DistributedModelParallel(model, device=device, plan=ShardingPlan({"tables": layout}), sharders=[sharder])
    tables = sharded.module.tables
    if save:
        fill(tables._embedding_module)
        check(sharded, batch(rank))
        checkpoint.save(tables.state_dict(), checkpoint_id=folder)
    else:
        state = tables.state_dict()
        checkpoint.load(state, checkpoint_id=folder)
        tables.load_state_dict(state)
        check(sharded, batch(rank))
        for name in TABLES:
            module = tables._managed_collision_collection._managed_collision_modules[name]
            segments = module._output_segments_tensor
            assert int((segments >= 0).sum()) == dist.get_world_size() + 1  # of these ranks, not those that saved
    pooled, _ = sharded(batch(rank))
    pooled.sum().backward()


def test_saved_on_two_ranks_and_loaded_on_one_and_three(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    run_on_ranks(on_ranks, 2, folder, True)
    run_on_ranks(on_ranks, 1, folder, False)
    run_on_ranks(on_ranks, 3, folder, False)
