"""The map itself: what it accepts, keeps on disk, and gives to ids that it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recpress.modules.hashing.id_map import IdMap, universal_hash


def made(num_ids: int = 50, num_rows: int = 7, rows_per_id: int = 1, **more: object) -> IdMap:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(num_rows, (num_ids, rows_per_id), generator=generator, dtype=torch.int32)
    return IdMap(rows=rows, num_rows=num_rows, **more)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_saved_map_comes_back_whole(tmp_path: Path, weighted: bool) -> None:
    weights = torch.rand(50, 2) if weighted else None
    before = made(rows_per_id=2, weights=weights, method="double", vocabulary="v1", seed=9)
    before.save(tmp_path)
    after = IdMap.load(tmp_path, vocabulary="v1")
    assert torch.equal(after.rows, before.rows)
    assert (after.weights is None) == (weights is None)
    if weights is not None:
        assert torch.equal(after.weights, weights)
    assert (after.num_rows, after.method, after.vocabulary, after.seed) == (7, "double", "v1", 9)
    strange = torch.tensor([-1, 10**12])
    assert torch.equal(after.hashed(strange), before.hashed(strange))


def test_its_text_has_its_sizes_and_no_rows() -> None:
    id_map = IdMap(rows=torch.zeros((1000, 2), dtype=torch.int32), num_rows=3, weights=torch.ones(1000, 2), method="x")
    assert repr(id_map) == "IdMap(num_ids=1000, num_rows=3, rows_per_id=2, weighted, method='x')"


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    made(vocabulary="v1").save(tmp_path)
    with pytest.raises(ValueError, match="vocabulary v1, expected v2"):
        IdMap.load(tmp_path, vocabulary="v2")


@pytest.mark.parametrize("damage", ["missing", "truncated", "no key", "row outside"])
def test_a_damaged_map_is_refused(tmp_path: Path, damage: str) -> None:
    made().save(tmp_path)
    if damage == "missing":
        (tmp_path / "rows.npy").unlink()
    elif damage == "truncated":
        path = tmp_path / "rows.npy"
        path.write_bytes(path.read_bytes()[:-5])
    else:
        meta = json.loads((tmp_path / "map.json").read_text())
        if damage == "no key":
            del meta["seed"]
        else:
            meta["num_rows"] = 3
        (tmp_path / "map.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="incomplete or corrupt id map"):
        IdMap.load(tmp_path)


def test_a_row_outside_of_the_table_is_named() -> None:
    rows = torch.tensor([[0], [4], [2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"id 1 has row \[4\], expected 0 to 3"):
        IdMap(rows=rows, num_rows=4)


def test_bytes_are_those_of_packed_bits() -> None:
    assert made(num_ids=10, num_rows=8).nbytes == 4  # 10 * 3 bits
    assert made(num_ids=10, num_rows=9).nbytes == 5  # 10 * 4 bits
    assert made(num_ids=10, num_rows=9, rows_per_id=2, weights=torch.ones(10, 2)).nbytes == 10 + 80
    assert made(num_ids=10, num_rows=8, computed=True).nbytes == 0


def test_the_hash_spreads_and_depends_on_seed_and_way() -> None:
    ids = torch.arange(100_000)
    rows = universal_hash(ids, 1000, seed=0, rows_per_id=2)
    counts = torch.bincount(rows[:, 0], minlength=1000).double()
    assert 0.8 < float(counts.var()) / 100 < 1.2  # a Poisson's variance is its mean
    assert float((rows[:, 0] == rows[:, 1]).double().mean()) < 0.003
    assert float((rows[:, 0] == universal_hash(ids, 1000, seed=1)[:, 0]).double().mean()) < 0.003
    assert torch.equal(rows, universal_hash(ids, 1000, seed=0, rows_per_id=2))
