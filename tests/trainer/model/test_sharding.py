"""The planner is shown the bytes that tables really take, and no rank gets a large table whole."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable, Storage
from recpress.trainer.model.sharding import planner, sharders
from tests.ranks import run_on_ranks

STORAGES = get_args(Storage)


def planned_bytes(model: nn.Module, device: str) -> dict[tuple[str, str], int]:
    """(table, sharding type) -> bytes that the planner counts for its shards, and for ids and vectors of a batch."""
    cluster = Topology(2, device, local_world_size=2, hbm_cap=1 << 34, ddr_cap=1 << 34)
    chosen = planner(model, cluster, batch_size=1)
    options = EmbeddingEnumerator(cluster, batch_size=1, constraints=chosen._constraints).enumerate(
        model, sharders(device_type=device)
    )
    return {
        (option.name, option.sharding_type): sum(
            shard.storage.ddr if device == "cpu" else shard.storage.hbm for shard in option.shards
        )
        for option in options
    }


def frozen(storage: Storage, dim: int, rows: int, device: str = "meta") -> FrozenEmbeddingBagCollection:
    return FrozenEmbeddingBagCollection(
        [FrozenTable(name="t", rows=rows, dim=dim, features=("f",), storage=storage)], device
    )


@pytest.mark.parametrize("dim", [12, 64, 128])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_frozen_tables_bytes(storage: Storage, dim: int) -> None:
    """The difference of two numbers of rows leaves out what does not depend on them."""
    few, many = (planned_bytes(nn.ModuleDict({"x": frozen(storage, dim, rows)}), "cpu") for rows in (1000, 5000))
    real = frozen(storage, dim, 5000, "cpu").storage_bytes() - frozen(storage, dim, 1000, "cpu").storage_bytes()
    assert many.keys() == few.keys()
    assert ("t", "row_wise") in many
    assert {many[key] - few[key] for key in many} == {real}


@pytest.mark.parametrize("dim", [12, 64])
def test_rows_of_int4_are_padded_on_cuda(dim: int) -> None:
    few, many = (planned_bytes(nn.ModuleDict({"x": frozen("int4", dim, rows)}), "cuda") for rows in (1000, 5000))
    assert {many[key] - few[key] for key in many} == {4000 * (-(-(dim // 2 + 4) // 16) * 16)}


def test_a_trainable_tables_bytes_and_its_optimizers() -> None:
    def model(rows: int) -> nn.Module:
        config = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=64, feature_names=["f"])
        return nn.ModuleDict({"x": EmbeddingBagCollection([config], device=torch.device("meta"))})

    few, many = planned_bytes(model(1000), "cpu"), planned_bytes(model(5000), "cpu")
    assert many["t", "row_wise"] - few["t", "row_wise"] == 4000 * (64 * 4 + 4)


def largest_shares(rows: int, storage: Storage, world: int) -> tuple[str, float]:
    cluster = Topology(world, "cuda", local_world_size=8, hbm_cap=80 << 30, ddr_cap=128 << 30)
    model = nn.ModuleDict({"x": frozen(storage, 128, rows)})
    layout = planner(model, cluster, batch_size=4096).plan(model, sharders(device_type="cuda"))
    how = layout.plan["x"]["t"]  # type: ignore[index]
    held = [0] * world
    for part in how.sharding_spec.shards:  # type: ignore[union-attr]
        held[part.placement.rank()] += part.shard_sizes[0] * part.shard_sizes[1]
    return how.sharding_type, max(held) / (rows * 128)


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_no_rank_of_64_gets_a_large_table_whole(storage: Storage) -> None:
    kind, share = largest_shares(100_000_000, storage, 64)
    assert "row_wise" in kind
    assert share <= 1 / 8 + 1e-6  # of one node, if not of all


def on_two_ranks() -> list[tuple[int, int]]:
    """Bytes that the shards of this rank take, and the planner's."""
    import torch.distributed as dist

    from recpress.trainer.model.sharding import shard

    found = []
    for storage in STORAGES:
        module = nn.ModuleDict({"x": frozen(storage, 12, 1001), "top": nn.Linear(1, 1)})
        dmp = shard(module, torch.device("cpu"), batch_size=1, sharding_types={"t": "row_wise"})
        mine = torch.tensor(dmp.module["x"].storage_bytes())
        dist.all_reduce(mine)
        few = planned_bytes(nn.ModuleDict({"x": frozen(storage, 12, 1000)}), "cpu")["t", "row_wise"]
        many = planned_bytes(nn.ModuleDict({"x": frozen(storage, 12, 2001)}), "cpu")["t", "row_wise"]
        found.append((int(mine), many - few))
    return found


def test_what_two_ranks_hold_is_what_was_planned() -> None:
    for held, planned in run_on_ranks(on_two_ranks, 2)[0]:
        assert held == planned


def on_one_rank_too_small() -> str:
    from recpress.data.errors import InputError
    from recpress.trainer.model.sharding import plan

    config = EmbeddingBagConfig(name="t", num_embeddings=10**13, embedding_dim=64, feature_names=["f"])
    model = nn.ModuleDict({"x": EmbeddingBagCollection([config], device=torch.device("meta"))})
    with pytest.raises(
        InputError, match=r"the largest of them 't' of .* GiB.* do not fit in the .*; expected more ranks"
    ) as error:
        plan(model, torch.device("cpu"), batch_size=1)
    return str(error.value)


def test_tables_that_do_not_fit_are_one_line() -> None:
    assert "\n" not in run_on_ranks(on_one_rank_too_small, 1)[0]
