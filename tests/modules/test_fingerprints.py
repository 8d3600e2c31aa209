"""A checkpoint refuses a model with other id maps or frozen rows than it was saved with, however it is loaded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.modules.compression.replace import compress
from recpress.modules.fingerprints import rows_fingerprint
from recpress.modules.hashing.id_map import IdMap, map_fingerprint
from tests.ranks import run_on_ranks

IDS, DIM = 30, 8


def id_map(seed: int = 0) -> IdMap:
    rows = np.random.default_rng(seed).integers(0, 10, (IDS, 1)).astype(np.int32)
    return IdMap(rows=torch.from_numpy(rows), num_rows=10)


def frozen_rows(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(IDS, DIM)).astype(np.float32))


def batch() -> KeyedJaggedTensor:
    return KeyedJaggedTensor(["f0", "f1", "f2"], torch.tensor([1, 2, 3]), lengths=torch.ones(3, dtype=torch.int32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=f"t{k}", num_embeddings=IDS, embedding_dim=DIM, feature_names=[f"f{k}"])
            for k in range(3)
        ]
        self.tables = EmbeddingBagCollection(configs)
        self.top = nn.Linear(3 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.top(self.tables(features).values())


def made(map_seed: int = 0, rows_seed: int = 0, sharded: bool = False, load: bool = True) -> Any:
    """t0 has a map, t1 is frozen, t2 is untouched."""
    torch.manual_seed(1)
    model, report = compress(Model(), {"t0": id_map(map_seed)}, frozen={"t1": frozen_rows(rows_seed)})
    if sharded:
        from recpress.trainer.model.sharding import sharders

        if not load:  # as with sharders that do not load rows
            model.tables.frozen.pending = None
        model = DistributedModelParallel(model, device=torch.device("cpu"), sharders=sharders())
        if load:
            report.load(model)
    return model, report


def saved_and_loaded(sharded: bool, how: str, folder: Path, **other: int) -> str:
    """What loading a checkpoint into a model with other maps or rows says, up to its first forward; "" for nothing."""
    source, _ = made(sharded=sharded)
    want = source(batch()).detach()
    state = source.state_dict()
    if how == "dcp":
        checkpoint.save(state, checkpoint_id=folder)
    target, _ = made(sharded=sharded, **other)
    try:
        if how == "dcp":  # writes in place into the tensors of the model, and nobody calls load_state_dict
            checkpoint.load(target.state_dict(), checkpoint_id=folder)
        elif how == "torch.save" and not sharded:
            blob = io.BytesIO()
            torch.save(state, blob)
            blob.seek(0)
            target.load_state_dict(torch.load(blob))
        else:
            keys = target.load_state_dict(state)
            assert not keys.missing_keys
            assert not keys.unexpected_keys
        torch.testing.assert_close(target(batch()).detach(), want)
    except ValueError as error:
        return str(error)
    return ""


def all_ways(folder: str, sharded: bool) -> list[tuple[str, ...]]:
    return [
        tuple(
            saved_and_loaded(sharded, how, Path(folder) / f"{how}-{k}", **other)
            for k, other in enumerate(({}, {"map_seed": 1}, {"rows_seed": 1}))
        )
        for how in ("state_dict", "torch.save", "dcp")
    ]


def check_said(found: list[tuple[str, ...]]) -> None:
    for same, other_map, other_rows in found:
        assert same == ""
        assert "'f0'" in other_map
        assert "'t0'" in other_map
        assert "another map" in other_map
        assert "'t1'" in other_rows
        assert "other rows" in other_rows


def test_a_plain_model(tmp_path: Path) -> None:
    check_said(all_ways(str(tmp_path), sharded=False))


@pytest.mark.parametrize("world", [1, 2])
def test_a_sharded_model(tmp_path: Path, world: int) -> None:
    for found in run_on_ranks(all_ways, world, str(tmp_path), True):
        check_said(found)


def late(folder: str) -> list[str]:
    """The checkpoint comes before the frozen rows: they are compared when they are loaded."""
    source, _ = made(sharded=True)
    checkpoint.save(source.state_dict(), checkpoint_id=folder)
    said = []
    for in_place in (True, False):
        for seed in (0, 1):
            target, report = made(rows_seed=seed, sharded=True, load=False)
            if in_place:
                checkpoint.load(target.state_dict(), checkpoint_id=folder)
            else:
                target.load_state_dict(source.state_dict())
            try:
                report.load(target)
                target(batch())
                said.append("")
            except ValueError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_rows_that_are_loaded_after_the_checkpoint(tmp_path: Path, world: int) -> None:
    for same, other, same_again, other_again in run_on_ranks(late, world, str(tmp_path)):
        assert same == same_again == ""
        assert "'t1'" in other
        assert "'t1'" in other_again


def test_a_checkpoint_without_fingerprints_loads() -> None:
    source, _ = made()
    old = {name: value for name, value in source.state_dict().items() if "fingerprint" not in name}
    target, _ = made(map_seed=1, rows_seed=1)
    target.load_state_dict(old)
    untouched = Model()
    untouched.load_state_dict(Model().state_dict())
    assert not any("fingerprint" in name for name in untouched.state_dict())


def test_other_rows_may_be_loaded_on_purpose() -> None:
    target, _ = made()
    target.load_state_dict(made()[0].state_dict())
    target.tables.load("t1", frozen_rows(1))  # such as factors of all rows in place of cross-fitted ones
    target(batch())
    with pytest.raises(ValueError, match="'t1'"):
        target.load_state_dict(made()[0].state_dict())


def test_what_a_fingerprint_of_a_map_sees() -> None:
    one = id_map()
    others = [
        IdMap(rows=one.rows, num_rows=11),
        IdMap(rows=one.rows, num_rows=10, seed=1),  # unknown ids get other rows
        IdMap(rows=one.rows, num_rows=10, weights=torch.ones(IDS, 1)),
        IdMap(rows=one.rows.flip(0).contiguous(), num_rows=10),
    ]
    assert torch.equal(map_fingerprint(one), map_fingerprint(id_map()))
    assert not any(torch.equal(map_fingerprint(one), map_fingerprint(other)) for other in others)


@pytest.mark.parametrize("rows", [1, 1000, 1024, 4096, 100_000])
def test_what_a_fingerprint_of_rows_sees(rows: int) -> None:
    source = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    found = rows_fingerprint(source)
    assert found.shape == (min(rows, 1024),)
    torch.testing.assert_close(rows_fingerprint(source.numpy()), found)
    other = source.clone()
    other[rows // 2] = -other[rows // 2] + 1
    if rows <= 4096:  # all rows are read
        assert not torch.allclose(rows_fingerprint(other), found)
    assert not torch.allclose(rows_fingerprint(source + 0.1), found)
