"""Settings chosen within a budget, in a file that every command takes."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from recpress.data.config import SynthConfig
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig
from recpress.trainer import cli, config_file
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.pipeline.config import PipelineConfig
from recpress.trainer.tune.config import TuneConfig
from recpress.trainer.tune.stage import tune

pytestmark = pytest.mark.slow  # trains models


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tune") / "log")
    synth(SynthConfig(users=900, items=300, rows=20_000, tastes=6, tastes_per_user=3, negatives=20), path)
    return path


@pytest.fixture(scope="module")
def tuned(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("tuned") / "tuned.toml")
    als = ALSConfig(max_factors=16, auto_trials=10, auto_cost=2.0)
    return out, tune(TuneConfig(data=log, out=out, trials=2, als=als, rate=0.5))


def test_the_best_of_the_trials_is_written(tuned):
    out, found = tuned
    content = tomllib.loads(Path(out).read_text())
    assert [path.name for path in Path(out).parent.iterdir()] == ["tuned.toml"]
    assert content == found.settings
    assert len(found.trials) == 2
    best, score = found.trials[0]
    assert score == max(score for _, score in found.trials)
    assert content["train"]["epochs"] == best.epochs
    assert content["train"]["optimizer"]["learning_rate"] == best.learning_rate
    assert content["factorize"]["als"].keys() >= {"factors", "unobserved_ratio", "mean_penalty"}


def test_every_command_takes_the_file(tuned, log, tmp_path):
    out, found = tuned
    name = ("--data", log, "--out", str(tmp_path / "x"))
    for command in ("factorize", "train", "pipeline", "compare cadc", "compare both", "compare hash", "hash", "tune"):
        assert cli.main(["check", *command.split(), "--config", out, *name]) == 0, command
    cadc = config_file.arguments(out, CompareCadcConfig, [], "compare cadc")
    assert cadc[cadc.index("--als.mean-penalty") + 1] == str(found.settings["factorize"]["als"]["mean_penalty"])
    assert cadc[cadc.index("--frozen.epochs") + 1] == str(found.settings["train"]["epochs"])
    pipeline = config_file.arguments(out, PipelineConfig, [], "pipeline")
    assert "--factorize.als.factors" in pipeline
    assert "--train.model.towers.dropout" in pipeline


def test_factorize_with_the_file_has_these_settings(tuned, log, tmp_path):
    out, found = tuned
    assert cli.main(["factorize", "--config", out, "--data", log, "--out", str(tmp_path / "factors")]) == 0
    manifest = json.loads((tmp_path / "factors" / "manifest.json").read_text())
    chosen = found.settings["factorize"]["als"]
    assert {key: manifest["config"]["als"][key] for key in chosen} == chosen
    assert manifest["parameters"]["factors"] == chosen["factors"]
    assert manifest["checks"]["ok"]


def test_a_key_that_no_stage_has_is_named(tuned, tmp_path, capsys):
    bad = tmp_path / "bad.toml"
    shutil.copy(tuned[0], bad)
    bad.write_text(bad.read_text() + "[factorize.logistic]\nepoch = 3\n")
    assert cli.main(["check", "factorize", "--config", str(bad), "--data", "x", "--out", "y"]) == 2
    assert "epoch" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_at_once(log, tmp_path):
    (tmp_path / "there.toml").write_text("")
    with pytest.raises(ValueError, match="exists"):
        tune(TuneConfig(data=log, out=str(tmp_path / "there.toml")))
    with pytest.raises(ValueError, match="folder"):
        tune(TuneConfig(data=log, out=str(tmp_path / "no" / "t.toml")))
