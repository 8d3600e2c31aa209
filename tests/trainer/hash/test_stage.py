"""The stage that makes maps: what it writes, what it refuses, and ids that arrive later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recpress.data.config import SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
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
    factorize(FactorizeConfig(data=log, out=str(path), als=ALSConfig(factors=8, sweeps=4, auto=False)))
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


def test_a_map_of_another_log_is_refused(log: str, factors: str, tmp_path: Path) -> None:
    make_maps(config(log, tmp_path / "maps", factors))
    other = tmp_path / "other"
    synth(SynthConfig(users=50, items=40, rows=300, tastes=4, held_out_users=0), str(other))
    with pytest.raises(InputError, match="made for 400 users"):
        open_maps(str(tmp_path / "maps"), open_log(str(other)))
    manifest = json.loads((tmp_path / "maps" / "manifest.json").read_text())
    assert manifest["tables"]["user"]["num_ids"] == USERS


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
