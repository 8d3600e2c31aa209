"""`recpress evaluate` of models of labels."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.modules.config import ALSConfig
from recpress.trainer.cli import main
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train.model_stage import train_model
from tests.ranks import run_on_ranks
from tests.trainer.click_log import click_config, features, write_click_log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_click_log(tmp_path_factory.mktemp("shop") / "log")


@pytest.fixture(scope="module")
def model(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    factors = str(folder / "factors")
    factorize(FactorizeConfig(data=log, out=factors, als=ALSConfig(factors=8, sweeps=2)))
    train_model(click_config(log, folder / "model", features=features(factors)))
    shutil.rmtree(factors)  # the model has the rows
    return str(folder / "model")


def _metrics(log, model):
    return evaluate(EvaluateConfig(data=log, model=model))


def test_the_metrics_are_those_of_train_on_one_rank_and_on_two(log, model):
    manifest = json.loads((Path(model) / "manifest.json").read_text())
    alone = _metrics(log, model)
    assert alone == {"test": manifest["metrics"], "val": manifest["validation"] | {"rows": 700.0}}
    assert alone["test"]["rows"] == 900
    assert alone["test"]["AUC"] > 0.5
    for found in run_on_ranks(_metrics, 2, log, model, timeout=600):
        for part, metrics in alone.items():
            assert found[part] == pytest.approx(metrics, rel=1e-6)


def test_the_command_prints_the_parts_and_writes_json(log, model, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", "--data", log, "--model", model, "--parts", "val", "--out", str(out)]) == 0
    assert "model, val: AUC 0." in capsys.readouterr().out
    assert set(json.loads(out.read_text())) == {"val"}


def test_a_model_of_your_own_needs_its_factory(log, tmp_path, capsys):
    name = "examples.own_model:make"
    from recpress.trainer.model.factory import config_of

    train_model(click_config(log, tmp_path / "own", name, model=config_of(name)(hidden=(8,)), epochs=1))
    command = ["evaluate", "--data", log, "--model", str(tmp_path / "own"), "--parts", "test"]
    assert main(command) == 2
    assert f"pass --factory {name}" in capsys.readouterr().err
    assert main([*command, "--factory", name]) == 0
    metrics = json.loads((tmp_path / "own" / "manifest.json").read_text())["metrics"]
    assert f"AUC {metrics['AUC']:.4f}" in capsys.readouterr().out


def _without(part, *columns):
    def change(folder, model):
        table = pq.read_table(folder / f"{part}.parquet")
        pq.write_table(table.drop_columns(list(columns)), folder / f"{part}.parquet")

    return change


def _remove(*names):
    def change(folder, model):
        for name in names:
            (folder / name).unlink()

    return change


def _new_history(folder, model):
    table = pq.read_table(folder / "test.parquet")
    lists = pa.array([[0, 99]] * len(table), pa.list_(pa.int64()))
    pq.write_table(table.set_column(table.schema.get_field_index("history"), "history", lists), folder / "test.parquet")


def _older_users(folder, model):
    pq.write_table(pa.table({"age": np.arange(60), "income": np.zeros(60)}), folder / "users.parquet")


def _more_users(folder, model):
    table = pq.read_table(folder / "train.parquet").to_pandas()
    table.loc[0, "user_id"] = 60
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), folder / "train.parquet")


def _manifest(change):
    def write(folder, model):
        path = model / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


BAD = {
    "no held-out rows": (_remove("val.parquet", "test.parquet"), [], "no held-out rows; expected test.parquet or val"),
    "no such part": (_remove("val.parquet"), ["--parts", "val"], "no val part; it has test"),
    "no labels": (_without("test", "click"), ["--parts", "test"], "test part has no column 'click', the label"),
    "no column": (_without("test", "history"), ["--parts", "test"], "test part has no column 'history', which"),
    "no side table": (_remove("items.parquet"), [], "items.parquet: missing; expected it for the feature 'genres'"),
    "new ids": (_new_history, [], "test, column 'history': id 99, but the table 'item_id' of .* has 40 ids"),
    "new values": (_older_users, [], "users.parquet, column 'age': id 59, but the table 'age' of .* has 7 ids"),
    "new users": (_more_users, [], "made for 60 users .*, but .* has 61"),
    "a ranking": (lambda folder, model: None, ["--evaluation.k", "5"], "evaluation.*: options of a ranking"),
    "another release": (
        _manifest(lambda content: content["model"]["features"]["age"].pop("sharding")),
        [],
        "its manifest does not describe a model of this release",
    ),
    "other options": (
        _manifest(lambda content: content["model"]["options"].update(width=3)),
        [],
        "its options do not fit --model dlrm of this release",
    ),
    "another version": (_manifest(lambda content: content.update(version=99)), [], "format version 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(log, model, case, tmp_path, capsys):
    import re

    change, options, message = BAD[case]
    folder = tmp_path / "log"
    shutil.copytree(log, folder)
    shutil.copytree(model, tmp_path / "model")
    change(folder, tmp_path / "model")
    assert main(["evaluate", "--data", str(folder), "--model", str(tmp_path / "model"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


def test_options_of_labels_need_a_model_of_labels(log, tmp_path, capsys):
    factors = str(tmp_path / "factors")
    factorize(FactorizeConfig(data=log, out=factors, als=ALSConfig(factors=8, sweeps=1)))
    assert main(["evaluate", "--data", log, "--model", factors, "--parts", "test"]) == 2
    assert "parts: an option of models of labels" in capsys.readouterr().err
