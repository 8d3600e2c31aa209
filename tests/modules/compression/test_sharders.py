"""The sharders, with TorchRec's planner without constraints on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardedModule
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection

from recpress.modules import FrozenEmbeddingBagCollection, FrozenTable, LearnedCollisionModule, LearnedHash, sharders
from recpress.modules.compression.replace import compress
from tests.modules.compression.model_cases import FEATURES, IDS, Train, collection, dlrm, id_map, made, source
from tests.modules.compression.test_collections import variable
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


class Over(nn.Module):
    """A collection and a dense layer."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables, self.top = tables, nn.Linear(1, 1)

    def forward(self, features: KeyedJaggedTensor) -> Any:
        return self.tables(features)


def shard(tables: nn.Module, constraints: dict[str, ParameterConstraints] | None = None) -> DistributedModelParallel:
    model, chosen = Over(tables), sharders()
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=4, constraints=constraints)
    plan = planner.collective_plan(model, chosen, dist.group.WORLD)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=chosen)


def sequences() -> EmbeddingCollection:
    torch.manual_seed(2)
    return EmbeddingCollection(
        [EmbeddingConfig(name=t, num_embeddings=IDS, embedding_dim=8, feature_names=f) for t, f in FEATURES.items()]
    )


def all_kinds() -> None:
    batch = made(dist.get_rank())
    # frozen and two-row tables of sequences, in each layout
    maps, frozen = {"t1": id_map(rows_per_id=2), "t3": id_map(7)}, {"t2": source(), "t3": source()}
    want = compress(sequences(), maps, frozen)[0](batch)
    for layout in ("table_wise", "row_wise", "column_wise", "data_parallel"):
        limits = {t: ParameterConstraints(sharding_types=[layout]) for t in ("t2", "t3")}
        found = shard(compress(sequences(), maps, frozen)[0], limits)(batch)
        for key, value in want.items():
            torch.testing.assert_close(found[key].values(), value.values(), msg=f"{layout} {key}")
            assert torch.equal(found[key].lengths(), value.lengths())
    # quantized frozen tables of 256 dimensions, which the planner splits by column, and the other layouts
    ids = KeyedJaggedTensor(["f"], torch.tensor([3, 0, 9]), lengths=torch.tensor([2, 1], dtype=torch.int32))
    rows = source(2000, 256)
    exact = torch.stack([rows[3] + rows[0], rows[9]])
    for storage, bound in (("int8", 0.03), ("int4", 0.5)):
        for layout in (None, "column_wise", "data_parallel", "table_row_wise", "grid_shard", "table_column_wise"):
            tables = FrozenEmbeddingBagCollection(
                [FrozenTable(name="t", rows=2000, dim=256, features=("f",), storage=storage)], device="meta"
            )
            limits = {} if layout is None else {"t": ParameterConstraints(sharding_types=[layout])}
            model = shard(tables, limits)
            model.module.tables.load("t", rows)
            found = model(ids)["f"]
            assert float((found - exact).abs().max()) <= bound, (storage, layout)
    # collision modules
    one = {t: id_map() for t in FEATURES}
    hashes = LearnedHash({f: one[t] for t, features in FEATURES.items() for f in features})
    for bags in (True, False):
        tables: Any = collection() if bags else sequences()
        configs = tables.embedding_bag_configs() if bags else tables.embedding_configs()
        for config in configs:
            config.num_embeddings = 10
        tables = type(tables)(configs)
        kind = ManagedCollisionEmbeddingBagCollection if bags else ManagedCollisionEmbeddingCollection
        collisions = ManagedCollisionCollection({t: LearnedCollisionModule(one[t]) for t in one}, configs)
        model = shard(kind(tables, collisions))
        inner = model.module.tables._embedding_module
        assert isinstance(inner, ShardedModule)
        inner.load_state_dict(tables.state_dict())
        found, want = model(batch)[0], tables(hashes(batch))
        found = found.wait() if hasattr(found, "wait") else found
        for key in want if isinstance(want, dict) else want.keys():
            pair = (found[key], want[key])
            torch.testing.assert_close(*(p if bags else p.values() for p in pair), msg=key)


def test_all_kinds_of_tables_with_the_default_planner() -> None:
    run_on_ranks(all_kinds, 2, timeout=500)


def position_weighted() -> FeatureProcessedEmbeddingBagCollection:
    torch.manual_seed(0)
    processors = PositionWeightedModuleCollection({f: 4 for features in FEATURES.values() for f in features})
    for weights in processors.position_weights.values():
        nn.init.uniform_(weights)
    return FeatureProcessedEmbeddingBagCollection(collection(is_weighted=True), processors)


def sharded_as_plain() -> None:
    given = variable()
    of_variable = KeyedJaggedTensor(
        given.keys(),
        given.values(),
        lengths=given.lengths(),
        stride_per_key_per_rank=given.stride_per_key_per_rank(),
        inverse_indices=given.inverse_indices(),
    )
    two, frozen = {"t3": id_map(9, rows_per_id=2)}, {"t0": source(), "t3": source()}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any], KeyedJaggedTensor]] = [
        (collection, two, frozen, of_variable),
        (collection, {}, {"t0": source()}, made()),  # untouched tables keep their rows, too
        (position_weighted, {"t0": id_map(10)}, {}, made()),
    ]
    for make, maps, rows, batch in cases:
        want = compress(make(), maps, rows)[0](batch)
        model = DistributedModelParallel(Over(compress(make(), maps, rows)[0]), device=CPU, sharders=sharders())
        found = model(batch)
        for key in want.keys():  # noqa: SIM118 (of a KeyedTensor)
            value = found[key]
            torch.testing.assert_close(value.wait() if hasattr(value, "wait") else value, want[key], msg=key)


def test_sharded_collections_give_what_plain_ones_give() -> None:
    run_on_ranks(sharded_as_plain, 1)


def unsharded() -> None:
    for device in ("cpu", "meta"):
        model, _ = compress(Train(dlrm(device=device)), {}, {"t2": source()})
        with pytest.raises(ValueError, match=r"'t2': .*sharders=recpress.modules.sharders\(\)"):
            DistributedModelParallel(model, device=CPU)
    # rows of a shared table, lost in sharding by others' sharders
    model, report = compress(Train(dlrm()), {"t0": id_map()})
    model = DistributedModelParallel(model, device=CPU)
    with pytest.raises(ValueError, match=r"'t0': sharding has discarded the rows.*report.load"):
        model(made())
    report.load(model)
    model(made())
    model, _ = compress(Train(dlrm()), {"t0": id_map()}, warm_start=False)
    DistributedModelParallel(model, device=CPU)(made())


def test_frozen_tables_that_are_not_sharded_raise_at_the_call() -> None:
    run_on_ranks(unsharded, 1)


def test_sharders_replace_those_of_torchrec() -> None:
    types = [sharder.module_type for sharder in sharders()]
    assert len(types) == len(set(types))
    assert EmbeddingBagCollection in types
    assert FrozenEmbeddingBagCollection in types
