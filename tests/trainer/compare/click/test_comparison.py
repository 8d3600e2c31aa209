"""`compare hash --backbone dlrm`, small: what it finds, writes and refuses."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.trainer.cli import main
from recpress.trainer.compare.click.data import ClickLog
from recpress.trainer.compare.config import CLICK_METHODS, ClickConfig, CompareHashConfig
from recpress.trainer.compare.hash import compare_hash
from recpress.trainer.compare.hash_result import format_hash_tables
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.features.config import FeatureConfig

pytestmark = pytest.mark.slow  # trains models

CLICK = ClickConfig(dim=8, epochs=2, batch_size=400, table_learning_rate=0.3, learning_rate=5e-3)
SCHEMA = Schema(label="label", floats=("price",))


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Users click items of their own group: 3 groups, 150 users, 90 items, which also have tags and prices."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 3, 150), rng.integers(0, 3, 90)
    folder = tmp_path_factory.mktemp("clicks")
    for part, rows in (("train", 10_000), ("val", 1_000), ("test", 2_000)):
        user, item = rng.integers(0, 150, rows), rng.integers(0, 90, rows)
        click = rng.random(rows) < np.where(users[user] == items[item], 0.9, 0.2)
        table = {"user_id": user, "item_id": item, "price": rng.random(rows), "label": click.astype(np.int8)}
        pq.write_table(pa.table(table), folder / f"{part}.parquet")
    tags = pa.array([[k % 2, 2 + k % 5] for k in range(90)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"tags": tags}), folder / "items.parquet")
    return str(folder)


def config(data, out, **more):
    given = {"backbone": "dlrm", "schema": SCHEMA, "seeds": (0,), "trials": 1, "share": 0.3, "click": CLICK}
    return CompareHashConfig(data=data, out=str(out), **given | more)


@pytest.fixture(scope="module")
def compared(clicks, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "clicks"
    return out, compare_hash(config(clicks, out))


def test_all_methods_are_ranked_within_both_budgets(compared):
    _, result = compared
    assert {method.key for method in result.rows.methods} == {"full", *CLICK_METHODS}
    full = result.method("full")
    for ranking in result.rankings.values():
        for method in ranking.methods:
            if method.key != "full":
                assert method.trials == 1
                assert method.rows <= round(0.3 * full.rows)
                assert 0.45 < method.mean("AUC") < 0.9
                assert method.row_bytes == method.rows * 8 * 4
    assert all(method.bytes <= result.byte_budget for method in result.bytes.methods if method.key != "full")
    assert result.rows.method("learned").map_bytes > 0
    assert result.bytes.method("learned").rows < result.rows.method("learned").rows
    assert result.bytes.method("robe").metrics == result.rows.method("robe").metrics


def test_learned_rows_are_ahead_of_the_hashing_trick_if_ids_are_alike(compared):
    _, result = compared
    assert result.rows.method("learned").mean("AUC") > result.rows.method("universal").mean("AUC") + 0.01


def test_the_files_hold_what_was_found(compared):
    out, result = compared
    saved = json.loads((out / "result.json").read_text())
    assert [m["key"] for m in saved["bytes"]["methods"]] == [m.key for m in result.bytes.methods]
    assert saved["data"]["tables"] == 3
    page, text = (out / "report.html").read_text(), format_hash_tables(result)
    for part in ("AUC", "LogLoss", "NE", "CAFE", "MPZCH"):
        assert part in page
    assert "Equal rows" in text
    assert "> Learned" in text


def test_one_ranking_a_dcn_and_features_from_a_file(clicks, tmp_path, capsys):
    file = tmp_path / "clicks.toml"
    features = "[features.user_id]\n[features.item_id]\n[features.price]\ntransform = ['log1p']\n"
    file.write_text(f"backbone = 'dcn-v2'\n[schema]\nlabel = 'label'\n{features}")
    arguments = ["compare", "hash", "--config", str(file), "--data", clicks, "--out", str(tmp_path / "out")]
    options = ["--methods", "universal", "--no-equal-rows", "--seeds", "0", "1", "--trials", "2", "--click.epochs", "1"]
    assert main([*arguments, *options]) == 0
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert saved["rows"] is None
    assert saved["data"]["tables"] == 2
    assert [method["key"] for method in saved["bytes"]["methods"]] == ["full", "universal"]
    assert "Equal bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "needs a log with labels"),
        (
            {"features": {"user_id": FeatureConfig(dimension=4)}},
            r"features\.user_id\.dimension: compare hash makes the tables",
        ),
        ({"features": {"city": FeatureConfig()}}, "no column 'city'"),
        ({"rows": 2}, "a budget of 2, expected 3 to"),
        ({"schema": Schema()}, "no label"),
    ],
)
def test_what_cannot_be_compared_is_refused(clicks, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        compare_hash(replace(config(clicks, tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


def test_parts_that_a_log_does_not_have_are_held_out_of_train(tmp_path):
    rng = np.random.default_rng(0)
    pq.write_table(pa.table({"C1": np.arange(2_000), "label": rng.integers(0, 2, 2_000)}), tmp_path / "train.parquet")
    schema = Schema(user="", item="", label="label", categorical=("C1",))
    with process_group("cpu"):
        log = ClickLog(str(tmp_path), schema, {}, dim=8, threshold=None)
    ids = [part.columns["C1"].tolist() for part in (log.train, log.val, log.test)]
    assert sorted(itertools.chain(*ids)) == list(range(2_000))
    assert 150 < len(log.val) < 250 > len(log.test) > 150


def test_a_budget_that_no_method_can_use_is_refused(clicks, tmp_path):
    little = {"methods": ("learned-2",), "rows": 4, "equal_rows": False}
    with pytest.raises(InputError, match="no method can use this budget: does not fit"):
        compare_hash(config(clicks, tmp_path / "out", click=replace(CLICK, epochs=1), **little))


def test_a_log_of_one_label_is_refused(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table({"C1": list(range(3)) * 10, "label": [1] * 30}), log / f"{part}.parquet")
    schema = Schema(user="", item="", label="label", categorical=("C1",))
    with pytest.raises(InputError, match="only the label 1"):
        compare_hash(config(str(log), tmp_path / "out", schema=schema))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("modulo",)}, "methods: 'modulo', expected some of universal"),
        ({"backbone": "als", "features": {"user_id": FeatureConfig()}}, "features: backbone als"),
        ({"backbone": "als", "equal_rows": False}, "equal_rows: backbone als"),
        ({"equal_rows": False, "equal_bytes": False}, "at least one ranking"),
        ({"metric": "Recall@10"}, "expected one of AUC, LogLoss, NE"),
        ({"label_threshold": float("nan")}, "label_threshold is nan"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        config("log", tmp_path, **change)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"dim": 6}, "multiple of 4"), ({"learning_rate": 0.0}, "positive"), ({"epochs": 0}, "click.epochs")],
)
def test_settings_of_the_model_that_cannot_be_used_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        ClickConfig(**option)
