"""The stage that makes maps: what it writes, what it refuses, and ids that arrive later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import IngestConfig, Schema, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from tests.ranks import run_on_ranks

USERS, ITEMS = 400, 300


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hash") / "log"
    synth(SynthConfig(users=USERS, items=ITEMS, rows=12_000, tastes=8), str(path))
    return str(path)


@pytest.fixture(scope="module")
def factors(log: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("hash") / "factors"
    factorize(FactorizeConfig(data=log, out=str(path), als=ALSConfig(factors=8, sweeps=4)))
    return str(path)


def config(log: str, out: Path, factors: str | None = None, **more: object) -> HashStageConfig:
    return HashStageConfig(data=log, out=str(out), factors=factors, iterations=5, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"method": "modulo"},
        {"method": "frequency"},
        {"method": "louvain"},
        {"method": "cluster", "split": "ids"},
        {"method": "learned"},
        {"method": "learned", "rows_per_id": 2},
    ],
    ids=lambda more: " ".join(map(str, more.values())),
)
def test_a_budget_is_kept_and_the_map_is_the_logs(log: str, factors: str, tmp_path: Path, more: dict) -> None:
    made = make_maps(config(log, tmp_path / "maps", factors, rows=140, **more))
    opened = open_log(log)
    found = open_maps(str(tmp_path / "maps"), opened)
    assert [table.name for table in made.tables] == ["user", "item"]
    maps = [found.map("user"), found.map("item")]
    assert [m.num_ids for m in maps] == [USERS, ITEMS]
    total = sum(m.num_rows for m in maps)
    assert total <= 140
    if more["method"] != "louvain":
        assert total == 140
    for side, id_map in zip(("user", "item"), maps, strict=True):
        vectors = found.rows(side)
        assert vectors is not None
        assert vectors.shape == (id_map.num_rows, 8)
        assert np.isfinite(vectors[0 : id_map.num_rows]).all()


def test_rows_stand_for_their_ids_weighted_by_counts(log: str, factors: str, tmp_path: Path) -> None:
    make_maps(config(log, tmp_path / "maps", factors, rows=140))
    opened = open_log(log)
    found = open_maps(str(tmp_path / "maps"), opened)
    id_map, vectors = found.map("item"), found.rows("item")
    assert vectors is not None
    source = torch.from_numpy(open_factors(factors, opened).table("item")[0:ITEMS])
    counts = torch.from_numpy(opened.counts("item")).float().clamp_min(0.1)
    row = int(id_map.rows[0, 0])
    members = (id_map.rows[:, 0] == row).nonzero()[:, 0]
    want = (source[members] * counts[members, None]).sum(0) / counts[members].sum()
    assert torch.allclose(torch.from_numpy(np.asarray(vectors[row : row + 1]))[0], want, atol=1e-5)


def test_single_tables_can_be_given_their_rows_and_bytes_count_rows(log: str, factors: str, tmp_path: Path) -> None:
    made = make_maps(config(log, tmp_path / "a", factors, rows=100, table_rows=("item=70",)))
    assert {table.name: table.rows for table in made.tables} == {"user": 30, "item": 70}
    made = make_maps(config(log, tmp_path / "b", factors, bytes=50 * 8 * 4))
    assert sum(table.rows for table in made.tables) == 50


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


def test_features_of_raw_64_bit_ids_are_refused_by_column(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(2**40, 2**63 - 1, 100)
    lists = pa.array([[int(k)] for k in ids])
    pq.write_table(pa.table({"C1": ids, "C2": lists, "label": ids % 2}), tmp_path / "log.parquet")
    for name in ("C1", "C2"):
        schema = Schema(user="", item="", label="label", categorical=(name,))
        with pytest.raises(InputError, match=rf"log.parquet, column '{name}': id \d{{18,}} .*`recpress ingest`"):
            make_maps(config(str(tmp_path / "log.parquet"), tmp_path / "maps", schema=schema, features=(name,)))


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_ids_that_arrive_later_move_no_other(tmp_path: Path, rows_per_id: int) -> None:
    rng = np.random.default_rng(0)
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, users, items in ((old, 30, 20), (new, 36, 25)):
        folder.mkdir()
        pairs = np.array([(u, i) for u in range(users) for i in range(items) if rng.random() < 0.4 or u == i])
        table = pa.table({"user_id": np.append(pairs[:, 0], users - 1), "item_id": np.append(pairs[:, 1], items - 1)})
        pq.write_table(table, folder / "train.parquet")
        factorize(FactorizeConfig(data=str(folder), out=str(folder) + "-factors", als=ALSConfig(factors=4, sweeps=3)))
    make_maps(config(str(old), tmp_path / "before", str(old) + "-factors", rows=20, rows_per_id=rows_per_id))
    make_maps(config(str(new), tmp_path / "after", str(new) + "-factors", extend=str(tmp_path / "before")))
    before, after = (open_maps(str(tmp_path / name), None) for name in ("before", "after"))
    for side in ("user", "item"):
        a, b = before.map(side), after.map(side)
        assert torch.equal(b.rows[: a.num_ids], a.rows)
        assert (b.weights is None) == (rows_per_id == 1)
        assert b.num_rows == a.num_rows
        assert b.num_ids == (36 if side == "user" else 25)
    with pytest.raises(InputError, match="covers 36 ids"):
        make_maps(config(str(old), tmp_path / "back", str(old) + "-factors", extend=str(tmp_path / "after")))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": 5000}, "a budget of 5,000 rows: expected 2 to 700"),
        ({"rows": 1}, "a budget of 1 rows"),
        ({"method": "magic"}, "method 'magic': expected one of modulo"),
        ({"factors": None}, "table 'user': method 'learned' needs an embedding of its ids; expected --factors"),
        ({"factors": None, "embedding": ("user=a.npy",)}, "table 'item': .* or --embedding item=FILE"),
        ({"table_rows": ("shop=3",)}, "table_rows: no table 'shop'"),
        ({"table_rows": ("user=x",)}, "table_rows: user=x, expected a number"),
        ({"rows": 100, "table_rows": ("user=100",)}, "leave too few"),
        ({"embedding": ("shop=a.npy",)}, "embedding: no table 'shop'"),
        ({"features": ("colour",)}, "no categorical column 'colour'"),
        ({"extend": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_one_error_and_leaves_nothing(
    log: str, factors: str, tmp_path: Path, more: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_maps(replace(config(log, tmp_path / "maps", factors), **more))
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_embeddings_of_the_wrong_length_or_with_nan_are_refused(log: str, tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((USERS - 1, 4), np.float32))
    bad = np.random.default_rng(0).normal(size=(USERS, 4)).astype(np.float32)
    bad[17, 2] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    np.save(tmp_path / "items.npy", np.random.default_rng(1).normal(size=(ITEMS, 4)).astype(np.float32))
    np.save(tmp_path / "huge.npy", np.full((USERS, 4), 1e30, np.float32))
    for name, message in (("short", f"expected {USERS} rows"), ("bad", "row 17"), ("huge", "row 0 .* overflow")):
        files = (f"user={tmp_path}/{name}.npy", f"item={tmp_path}/items.npy")
        with pytest.raises(ValueError, match=message):
            make_maps(config(log, tmp_path / "maps", embedding=files, rows=100))
    assert not (tmp_path / "maps").exists()


def test_a_map_of_another_log_is_refused(log: str, factors: str, tmp_path: Path) -> None:
    make_maps(config(log, tmp_path / "maps", factors))
    other = tmp_path / "other"
    synth(SynthConfig(users=50, items=40, rows=300, tastes=4, held_out_users=0), str(other))
    with pytest.raises(InputError, match="made for 400 users"):
        open_maps(str(tmp_path / "maps"), open_log(str(other)))
    manifest = json.loads((tmp_path / "maps" / "manifest.json").read_text())
    assert manifest["tables"]["user"]["num_ids"] == USERS


def test_extending_is_refused_where_the_vocabulary_is_another(tmp_path: Path) -> None:
    """Logs of raw ids: a map follows a log that extends its own, and no other that merely has more ids."""
    rng = np.random.default_rng(0)
    for name, users, items, extend in (("a", 20, 15, None), ("b", 25, 18, "a"), ("c", 30, 25, None)):
        pairs = [(f"{name[0]}{u}", f"i{i}") for u in range(users) for i in range(items) if rng.random() < 0.5 or u == i]
        pq.write_table(
            pa.table({"user_id": [u for u, _ in pairs], "item_id": [i for _, i in pairs]}), tmp_path / f"{name}.parquet"
        )
        source = IngestConfig(
            input=str(tmp_path / f"{name}.parquet"),
            format="parquet",
            extend=None if extend is None else str(tmp_path / f"{extend}-log"),
        )
        ingest(source, str(tmp_path / f"{name}-log"))
    make_maps(config(str(tmp_path / "a-log"), tmp_path / "maps", method="modulo"))
    made = make_maps(config(str(tmp_path / "b-log"), tmp_path / "after", extend=str(tmp_path / "maps")))
    assert [table.num_ids for table in made.tables] == [45, 18]  # of both logs together
    with pytest.raises(InputError, match="table 'user' was made for another vocabulary"):
        make_maps(config(str(tmp_path / "c-log"), tmp_path / "wrong", extend=str(tmp_path / "maps")))
    assert not (tmp_path / "wrong").exists()


def test_a_map_of_features_follows_a_log_that_extends_its_own(tmp_path: Path) -> None:
    for name, kinds in (("a", 12), ("b", 15), ("c", 20)):
        values = [f"{'k' if name != 'c' else 'other'}{n}" for n in range(kinds)] * 5
        table = pa.table({"kind": values, "label": [float(n % 2) for n in range(len(values))]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        source = IngestConfig(
            input=str(tmp_path / f"{name}.parquet"), format="parquet", user="", item="", label="label",
            categorical=("kind",), extend=str(tmp_path / "a-log") if name == "b" else None,
        )  # fmt: skip
        ingest(source, str(tmp_path / f"{name}-log"))

    def stage(name: str, out: str, **more: object) -> HashStageConfig:
        return config(str(tmp_path / f"{name}-log"), tmp_path / out, features=("kind",), method="modulo", **more)

    make_maps(stage("a", "maps", rows=4))
    (table,) = make_maps(stage("b", "after", extend=str(tmp_path / "maps"))).tables
    assert table.num_ids > 12
    with pytest.raises(InputError, match="table 'kind' was made for another vocabulary"):
        make_maps(stage("c", "wrong", extend=str(tmp_path / "maps")))


def test_two_ranks_make_the_map_of_one(log: str, factors: str, tmp_path: Path) -> None:
    make_maps(config(log, tmp_path / "one", factors))
    first, second = run_on_ranks(make_maps, 2, config(log, tmp_path / "two", factors))
    assert [table.rows for table in first.tables] == [
        open_maps(str(tmp_path / "one"), None).map(side).num_rows for side in ("user", "item")
    ]
    assert second.tables == first.tables  # each rank makes one, and knows of both
    for side in ("user", "item"):
        one, two = (open_maps(str(tmp_path / name), None).map(side) for name in ("one", "two"))
        assert torch.equal(one.rows, two.rows)
