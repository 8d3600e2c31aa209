"""Maps that follow a log with new ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import IngestConfig
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.modules.config import ALSConfig
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps


def config(log: str, out: Path, factors: str | None = None, **more: object) -> HashStageConfig:
    return HashStageConfig(data=log, out=str(out), factors=factors, iterations=5, **more)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs `old` and `new`, which has further users and items, and their factors."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("grown")
    for name, users, items in (("old", 30, 20), ("new", 36, 25)):
        (folder / name).mkdir()
        pairs = np.array([(u, i) for u in range(users) for i in range(items) if rng.random() < 0.4 or u == i])
        table = pa.table({"user_id": np.append(pairs[:, 0], users - 1), "item_id": np.append(pairs[:, 1], items - 1)})
        pq.write_table(table, folder / name / "train.parquet")
        als = ALSConfig(factors=4, sweeps=3, auto=False)
        factorize(FactorizeConfig(data=str(folder / name), out=f"{folder}/{name}-factors", als=als))
    return folder


@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_ids_that_arrive_later_move_no_other(grown: Path, tmp_path: Path, rows_per_id: int) -> None:
    old, new = grown / "old", grown / "new"
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
