"""Factors on disk: any number of ranks writes and reads them, straight into sharded tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

from recpress.modules.als.factors import Factors, FactorTable, RowBlocks, shard_name
from recpress.modules.row_source import load_rows, local_shards
from tests.ranks import run_on_ranks

USERS, ITEMS, DIM = 23, 10, 8


def table(side: str) -> np.ndarray:
    rows = USERS if side == "user" else ITEMS
    return np.random.default_rng(len(side) + rows).standard_normal((rows, DIM)).astype(np.float32)


def write(folder, world: int) -> None:
    """As `world` ranks would."""
    for rank in range(world):
        users, items = RowBlocks(USERS, world), RowBlocks(ITEMS, world)
        Factors(
            torch.from_numpy(table("user")[users.start(rank) : users.stop(rank)]),
            torch.from_numpy(table("item")[items.start(rank) : items.stop(rank)]),
            USERS, ITEMS, rank, world,
        ).save(folder)  # fmt: skip


@given(st.integers(0, 200), st.integers(1, 9))
def test_blocks_cover_all_rows(num_rows, world):
    blocks = RowBlocks(num_rows, world)
    assert blocks.start(0) == 0
    assert blocks.stop(world - 1) == num_rows
    assert all(blocks.stop(rank) == blocks.start(rank + 1) for rank in range(world - 1))
    assert all(0 <= blocks.size(rank) <= -(-num_rows // world) for rank in range(world))


@pytest.mark.parametrize("world", [1, 2, 3, 11])
@pytest.mark.parametrize("side", ["user", "item"])
def test_any_rectangle_of_any_sharding(tmp_path, world, side):
    write(tmp_path, world)
    saved, whole = FactorTable(tmp_path, side), table(side)
    assert saved.shape == whole.shape
    for first in range(len(whole) + 1):
        np.testing.assert_array_equal(saved[first : first + 7], whole[first : first + 7])
    np.testing.assert_array_equal(saved[2:9, 3:5], whole[2:9, 3:5])
    ids = np.array([9, 0, 9, 4])
    np.testing.assert_array_equal(saved[ids], whole[ids])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def replace_rows(path):
    np.save(path, np.zeros((3, DIM), np.float32))


def narrow(path):
    np.save(path, np.zeros((11, 5), np.float32))


def pickled(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"user-00001-of-00002\.npy: missing, expected 2 shards"),
        (truncate, r"user-00001-of-00002\.npy: incomplete or corrupt shard"),
        (lambda path: path.write_bytes(b""), r"user-00001-of-00002\.npy: incomplete or corrupt shard"),
        (pickled, r"user-00001-of-00002\.npy: incomplete or corrupt shard"),
        (narrow, r"user-00001-of-00002\.npy: holds float32 \(11, 5\)"),
        (replace_rows, r"user-0000[01]-of-00002\.npy: \d+ rows, expected"),
        (lambda path: path.rename(path.with_name(shard_name("user", 2, 3))), "shards of"),
    ],
)  # fmt: skip
def test_a_spoiled_shard_is_one_clear_error(tmp_path, spoil, message):
    write(tmp_path, 2)
    spoil(tmp_path / shard_name("user", 1, 2))
    with pytest.raises(ValueError, match=message):
        FactorTable(tmp_path, "user")
    assert FactorTable(tmp_path, "item").shape == (ITEMS, DIM)


def test_ids_out_of_range_are_refused(tmp_path):
    write(tmp_path, 2)
    for bad in (-1, ITEMS):
        with pytest.raises(ValueError, match=f"item id {bad}, expected 0 to 9"):
            FactorTable(tmp_path, "item")[np.array([0, bad])]
    with pytest.raises(ValueError, match="no user-"):
        FactorTable(tmp_path / "nowhere", "user")


class Sharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding on CPU too, which TorchRec's own leaves out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise"]


def on_rank(folder: str, layout: str):
    """Fill sharded tables; return this rank's rectangles of both."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=side, embedding_dim=DIM, num_embeddings=rows, feature_names=[side])
            for side, rows in (("user", USERS), ("item", ITEMS))
        ],
        device=torch.device("meta"),
    )
    world = dist.get_world_size()
    kind = {
        "row": lambda: row_wise(),
        "table": lambda: table_wise(rank=world - 1),
        "column": lambda: column_wise(ranks=[k % world for k in range(2)]),
    }[layout]
    plan = construct_module_sharding_plan(
        collection, {"user": kind(), "item": kind()}, sharder=Sharder(), world_size=world, local_size=world,
        device_type="cpu",
    )  # fmt: skip
    model = DistributedModelParallel(
        collection,
        env=ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"": plan}),
        sharders=[Sharder()],
    )
    found = []
    for side in ("user", "item"):
        load_rows(model.module.state_dict()[f"embedding_bags.{side}.weight"], side, FactorTable(folder, side))
        weight = model.module.state_dict()[f"embedding_bags.{side}.weight"]
        found += [(side, place, tensor.clone()) for place, tensor in local_shards(weight)]
    try:
        load_rows(model.module.state_dict()["embedding_bags.item.weight"], "item", FactorTable(folder, "user"))
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize(("world", "layout"), [(2, "row"), (2, "column"), (2, "table"), (1, "row"), (3, "row")])
def test_loaded_into_sharded_tables(tmp_path, world, layout):
    """Written by 2 ranks, read by 1, 2 and 3."""
    write(tmp_path, 2)
    covered = {side: np.zeros((rows, DIM), int) for side, rows in (("user", USERS), ("item", ITEMS))}
    for found, error in run_on_ranks(on_rank, world, str(tmp_path), layout):
        assert "source has 23 rows, expected 10" in error
        for side, ((top, bottom), (left, right)), tensor in found:
            np.testing.assert_array_equal(tensor.numpy(), table(side)[top:bottom, left:right])
            covered[side][top:bottom, left:right] += 1
    assert all((count == 1).all() for count in covered.values())
