"""The tables to map: their counts, and embeddings from factors, files or a warm-up."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import Schema
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.cli import main
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.hash.tables import named, read_tables
from tests.ranks import run_on_ranks

USERS, ITEMS = 6, 5


@pytest.fixture
def log(tmp_path: Path) -> str:
    """Dense ids in three row groups, so that counts are read; item 3 and user 4 do not occur."""
    folder = tmp_path / "log"
    folder.mkdir()
    kinds: list[list[int]] = [[1], [], [1, 0], [], [], [], [2]]
    columns = {"user_id": [0, 0, 5, 1, 2, 3, 0], "item_id": [4, 4, 0, 1, 2, 2, 4], "kind": kinds}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=3)
    return str(folder)


def counted(log: str, **more: object) -> dict[str, tuple[int, list[float]]]:
    config = HashStageConfig(data=log, out="maps", method="modulo", **more)
    opened = open_log(log, Schema(categorical=("kind",)))
    return {table.name: (table.num_ids, table.counts.tolist()) for table in read_tables(config, opened)}


def test_counts_are_those_of_train_also_of_lists(log: str) -> None:
    (found,) = run_on_ranks(counted, 1, log)
    assert found == {"user": (6, [3, 1, 1, 1, 0, 1]), "item": (5, [1, 1, 2, 0, 3])}
    (features,) = run_on_ranks(_features, 1, log)
    assert features == {"kind": (3, [1, 2, 1])}


def _features(log: str) -> dict[str, tuple[int, list[float]]]:
    return counted(log, features=("kind",))


def test_features_of_raw_64_bit_ids_are_refused_by_column(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(2**40, 2**63 - 1, 100)
    lists = pa.array([[int(k)] for k in ids])
    pq.write_table(pa.table({"C1": ids, "C2": lists, "label": ids % 2}), tmp_path / "log.parquet")
    for name in ("C1", "C2"):
        schema = Schema(user="", item="", label="label", categorical=(name,))
        with pytest.raises(InputError, match=rf"log.parquet, column '{name}': id \d{{18,}} .*`recpress ingest`"):
            make_maps(
                HashStageConfig(
                    data=str(tmp_path / "log.parquet"), out=str(tmp_path / "maps"), schema=schema, features=(name,)
                )
            )


def test_more_ids_than_memory_holds_are_refused_before_they_are_counted(tmp_path: Path, capfd) -> None:
    """Not when an allocation fails, or the system kills the process."""
    pq.write_table(pa.table({"C1": ["a", "b"], "label": [0, 1]}), tmp_path / "log.parquet")
    command = ["hash", "--data", str(tmp_path / "log.parquet"), "--features", "C1", "--out", str(tmp_path / "maps")]
    command += ["--schema.user", "", "--schema.item", "", "--schema.label", "label"]
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 190e9:
        assert main([*command, "--schema.hashed", "C1=2000000000"]) == 2
        said = capfd.readouterr().err.strip()
        assert "column 'C1': 2,000,000,000 ids" in said
        assert "expected a smaller number in --schema.hashed" in said
        assert len(said.splitlines()) == 1
    assert main([*command, "--schema.hashed", "C1=2000", "--share", "0.01"]) == 0
    assert "1,998 of the ids do not occur" in capfd.readouterr().out


def test_named_values() -> None:
    assert named("embedding", ("user=a=b.npy", "item=c")) == {"user": "a=b.npy", "item": "c"}
    for bad in (("user",), ("=x",), ("user=",), ("user=a", "user=b")):
        with pytest.raises(InputError, match=r"embedding: '.*', expected NAME=VALUE, each name once"):
            named("embedding", bad)


def test_features_get_an_embedding_by_a_warm_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 40, 3000)
    other = rng.integers(0, 25, 3000)
    label = (rng.random(3000) < np.where(kind % 2 == 0, 0.9, 0.1)).astype(np.float32)
    path = tmp_path / "log"
    path.mkdir()
    pq.write_table(pa.table({"kind": kind, "other": other, "label": label}), path / "train.parquet")
    schema = Schema(user="", item="", label="label", categorical=("kind", "other"))
    stage = HashStageConfig(
        data=str(path), out=str(tmp_path / "maps"), schema=schema, features=("kind", "other"), rows=10, warm_dim=4
    )
    made = make_maps(stage)
    assert [(t.name, t.num_ids) for t in made.tables] == [("kind", 40), ("other", 25)]
    assert sum(t.rows for t in made.tables) == 10
    rows = open_maps(str(tmp_path / "maps"), None).map("kind").rows[:, 0]
    even, odd = set(rows[::2].tolist()), set(rows[1::2].tolist())
    assert not even & odd  # ids whose labels differ so do not share


def test_embeddings_of_the_wrong_length_or_with_nan_are_refused(log: str, tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((USERS - 1, 4), np.float32))
    bad = np.random.default_rng(0).normal(size=(USERS, 4)).astype(np.float32)
    bad[3, 2] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    np.save(tmp_path / "items.npy", np.random.default_rng(1).normal(size=(ITEMS, 4)).astype(np.float32))
    np.save(tmp_path / "huge.npy", np.full((USERS, 4), 1e30, np.float32))
    for name, message in (("short", f"expected {USERS} rows"), ("bad", "row 3"), ("huge", "row 0 .* overflow")):
        files = (f"user={tmp_path}/{name}.npy", f"item={tmp_path}/items.npy")
        with pytest.raises(ValueError, match=message):
            make_maps(HashStageConfig(data=log, out=str(tmp_path / "maps"), embedding=files, rows=4))
    assert not (tmp_path / "maps").exists()


def test_the_warm_up_refuses_lists(log: str, tmp_path: Path) -> None:
    path = Path(log) / "train.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("label", pa.array([0, 1] * 3 + [1])), path)
    schema = Schema(label="label", categorical=("kind",))
    stage = HashStageConfig(data=log, out=str(tmp_path / "maps"), schema=schema, features=("kind",), rows=2)
    with pytest.raises(InputError, match=r"features: 'kind' is a list; .*--embedding kind=FILE, or a --method"):
        make_maps(stage)
    np.save(tmp_path / "kind.npy", np.eye(3, dtype=np.float32))
    for more in ({"method": "frequency"}, {"embedding": (f"kind={tmp_path}/kind.npy",)}):
        assert make_maps(replace(stage, out=str(tmp_path / next(iter(more))), **more)).tables[0].rows == 2
