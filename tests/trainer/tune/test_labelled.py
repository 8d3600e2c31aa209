"""`recpress tune` of models of labels: a file that every command takes, and bad input."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from recpress.modules.config import ALSConfig
from recpress.trainer.cli import _config, main
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.model.factory import config_of
from recpress.trainer.train.config import HeldOutConfig
from recpress.trainer.train.model_stage import train_model
from recpress.trainer.tune.config import TuneModelConfig
from recpress.trainer.tune.labelled import LabelTrial, label_candidates, tune_model
from tests.ranks import run_on_ranks
from tests.trainer.click_log import SCHEMA, click_config, features, write_click_log

OWN = "examples.own_model:make"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_click_log(tmp_path_factory.mktemp("shop") / "log")


def config(log, out, factory="dlrm", trials=2, **changes):
    train = replace(click_config("", "", factory, **{"epochs": 5, **changes}), tensorboard=True)
    return TuneModelConfig(data=log, out=str(out), trials=trials, train=train)


def _tuned(log, factors, out):
    run = config(log, out, features=features(factors), evaluation=HeldOutConfig(metric="AUC"))
    return tune_model(run)


def test_the_best_trial_is_written_and_train_and_pipeline_take_the_file(log, tmp_path):
    factors = str(tmp_path / "factors")
    factorize(FactorizeConfig(data=log, out=factors, als=ALSConfig(factors=8, sweeps=1)))
    (tmp_path / "tuned").mkdir()
    out = tmp_path / "tuned" / "tuned.toml"
    first, second = run_on_ranks(_tuned, 2, log, factors, str(out), timeout=600)
    assert first.settings == second.settings == tomllib.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["tuned.toml"]  # the models are removed
    (best, score), (_, other) = first.trials
    assert score >= other
    assert first.settings["train"]["model"] == {"name": "dlrm"}

    trained = _config("train", ["--config", str(out), "--data", log, "--out", "x"])
    assert trained.factory == "dlrm"
    assert trained.features == features(factors)
    assert trained.schema == SCHEMA
    assert (trained.epochs, trained.optimizer.learning_rate) == (best.epochs, best.learning_rate)
    assert trained.optimizer.table_learning_rate == best.table_learning_rate
    assert trained.evaluation.metric == "AUC"
    assert trained.stream.batch_size == 400

    pipeline = _config("pipeline", ["--config", str(out), "--data", log, "--out", "x"])
    assert pipeline.train == replace(trained, data="", out="")
    for command in ("plan", "tune"):
        assert main(["check", command, "--config", str(out), "--data", log, "--out", "y"]) == 0
    assert _config("plan", ["--config", str(out), "--data", log]).features == features(factors)


def test_a_model_of_your_own_has_its_dropout_tuned(log, tmp_path, capsys):
    given = config(log, tmp_path / "tuned.toml", OWN, model=config_of(OWN)(hidden=(8,)), epochs=1)
    found = tune_model(given)
    assert {trial.epochs for trial, _ in found.trials} == {1}  # it was given
    content = (tmp_path / "tuned.toml").read_text()
    assert f"With --model {OWN}" in content
    settings = tomllib.loads(content)["train"]
    assert settings["model"] == {"hidden": [8], "dropout": found.trials[0][0].dropout}
    file = ["--config", str(tmp_path / "tuned.toml"), "--data", log, "--out", "x"]
    assert _config("train", ["--model", OWN, *file]).model == config_of(OWN)(**settings["model"] | {"hidden": (8,)})
    assert _config("pipeline", ["--train.model", OWN, *file]).train.factory == OWN


def test_log_loss_is_best_when_it_is_small_and_train_repeats_it(log, tmp_path):
    out = str(tmp_path / "tuned.toml")
    (_, best), (_, other) = tune_model(config(log, out)).trials
    assert best <= other
    run = _config("train", ["--config", out, "--data", log, "--out", str(tmp_path / "model"), "--no-tensorboard"])
    assert train_model(run).validation["LogLoss"] == best


def test_candidates_start_with_the_settings_as_given_and_repeat_none(log):
    found = label_candidates(config(log, "x", trials=12))
    assert (found[0].epochs, found[0].learning_rate, found[0].dropout) == (5, 1e-3, None)
    assert len(set(found)) == len(found) == 12
    fixed = OptimizerConfig(learning_rate=0.1, table_learning_rate=0.3)
    assert label_candidates(config(log, "x", epochs=7, optimizer=fixed)) == [LabelTrial(7, 0.1, 0.3, None)]


def test_names_of_features_are_quoted(log, tmp_path):
    named = {"user id": FeatureConfig(column="user_id"), "item_id": FeatureConfig()}
    tune_model(config(log, tmp_path / "tuned.toml", trials=1, features=named))
    assert tomllib.loads((tmp_path / "tuned.toml").read_text())["train"]["features"] == {
        "user id": {"column": "user_id"},
        "item_id": {},
    }


BAD = [
    (["--train.evaluation.every", "0"], "train.evaluation.every is 0"),
    (["--train.stop-after", "1"], "train.stop_after: expected 0"),
    (["--train.out", "x"], "train.out: expected none"),
    (["--trials", "0"], "trials is 0, expected at least 1"),
    (["--schema.label", "clicks"], "clicks"),
    (["--out", "no/folder/tuned.toml"], "its folder does not exist"),
    (["--als.factors", "8"], "als"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_tuned_is_one_line(log, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["tune", "--train.model", "dlrm", "--data", log, "--out", "tuned.toml", "--schema.label", "click"]
    assert main([*command, *options]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not Path("tuned.toml").exists()


def test_a_log_without_validation_rows_is_one_line(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "log").mkdir()
    rows = {"user_id": list(range(20)), "item_id": list(range(20)), "click": [0, 1] * 10}
    pq.write_table(pa.table(rows), tmp_path / "log" / "train.parquet")
    command = ["tune", "--train.model", "dlrm", "--data", str(tmp_path / "log"), "--out", str(tmp_path / "t.toml")]
    assert main([*command, "--schema.label", "click", "--trials", "1"]) == 2
    assert "no validation rows with both labels, on which tune chooses" in capsys.readouterr().err
