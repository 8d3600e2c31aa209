"""`recpress pipeline` with a model of labels: the recipe of the documentation, resumed, on two ranks, and bad input."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from recpress.data.errors import InputError
from recpress.trainer.cli import _config, main
from recpress.trainer.errors import Preempted
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.pipeline.config import PipelineModelConfig
from recpress.trainer.pipeline.stage import pipeline
from tests.ranks import run_on_ranks
from tests.trainer.click_log import SCHEMA, click_config, write_click_log

DOCUMENT = Path(__file__).parents[3] / "docs" / "train" / "models.md"
FAST = ["--train.stream.batch-size", "400", "--train.no-tensorboard"]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_click_log(tmp_path_factory.mktemp("shop") / "log")


@pytest.fixture(scope="module")
def recipe(log, tmp_path_factory):
    """The file of the documentation, and the folder of its outputs."""
    folder = tmp_path_factory.mktemp("recipe")
    text = re.search(r"```toml\n(# pipeline.toml\n.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    text = text.replace('"runs/log"', f'"{log}"').replace('"runs/clicks"', f'"{folder / "out"}"')
    (folder / "clicks.toml").write_text(text)
    assert main(["pipeline", "--config", str(folder / "clicks.toml"), *FAST]) == 0
    return folder


def configured(recipe, out):
    config = _config("pipeline", ["--config", str(recipe / "clicks.toml"), *FAST])
    assert isinstance(config, PipelineModelConfig)
    return replace(config, out=str(out))


@pytest.fixture
def copy(recipe, tmp_path):
    return shutil.copytree(recipe / "out", tmp_path / "out")


def test_the_recipe_of_the_documentation_makes_all_outputs(recipe, capsys):
    manifest = json.loads((recipe / "out" / "model" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "dlrm"
    assert manifest["config"]["features"]["user_id"]["frozen"] == str(recipe / "out" / "factors")
    metrics = json.loads((recipe / "out" / "metrics.json").read_text())
    assert metrics["test"] == manifest["metrics"]
    assert metrics["val"] == manifest["validation"] | {"rows": 700.0}
    assert metrics["test"]["AUC"] > 0.55
    assert main(["pipeline", "--config", str(recipe / "clicks.toml"), *FAST]) == 0  # skips all stages
    assert f"model, test: AUC {metrics['test']['AUC']:.4f}" in capsys.readouterr().out


def test_it_resumes_at_the_first_stage_that_is_missing(recipe, copy):
    assert pipeline(configured(recipe, copy)) == []
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "model")
    for left in run_on_ranks(_run, 2, recipe, copy, timeout=600):
        assert left == ["train", "evaluate"]
    shutil.rmtree(copy / "model")
    with pytest.raises(InputError, match=r"metrics.json: is there, but .*model, which comes before it, is not"):
        pipeline(configured(recipe, copy))


def _run(recipe, out):
    return pipeline(configured(recipe, out))


def test_a_signal_in_training_and_the_same_command(recipe, copy):
    whole = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "model")
    call = FeatureBatches.__call__

    def stopping(self, rows):
        if rows.epoch == 1 and rows.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, rows)

    FeatureBatches.__call__ = stopping
    try:
        with pytest.raises(Preempted):
            pipeline(configured(recipe, copy))
    finally:
        FeatureBatches.__call__ = call
    assert pipeline(configured(recipe, copy)) == ["train", "evaluate"]
    assert json.loads((copy / "metrics.json").read_text()) == whole


def changed(recipe, out, **changes):
    config = configured(recipe, out)
    return replace(config, train=replace(config.train, **changes))


def test_another_setting_than_the_model_was_made_with_is_named(recipe, copy):
    features = configured(recipe, copy).train.features
    with pytest.raises(InputError, match=r"made with train.epochs = 3 .now 4."):
        pipeline(changed(recipe, copy, epochs=4))
    with pytest.raises(InputError, match=r"made with train.factory = 'dlrm' .now 'dcn-v2'."):
        pipeline(changed(recipe, copy, factory="dcn-v2"))
    with pytest.raises(InputError, match=r"made with train.features.genres.pooling = 'mean' .now 'sum'."):
        pipeline(changed(recipe, copy, features={**features, "genres": FeatureConfig()}))
    with pytest.raises(InputError, match=r"train.features.age.column = None"):
        pipeline(changed(recipe, copy, features={**features, "age": FeatureConfig()}))


def test_learned_maps_and_all_columns(log, tmp_path):
    command = ["pipeline", "--train.model", "dcn-v2", "--data", log, "--out", str(tmp_path / "out"), *FAST]
    command += ["--schema.label", "click", "--schema.categorical", "user_id", "item_id", "--train.epochs", "1"]
    hashed = ["--stages", "hash", "train", "evaluate", "--hash.features", "item_id", "--hash.share", "0.5"]
    assert main([*command, *hashed, "--hash.method", "frequency"]) == 0
    manifest = json.loads((tmp_path / "out" / "model" / "manifest.json").read_text())
    assert manifest["config"]["maps"] == str(tmp_path / "out" / "maps")
    assert manifest["tables"]["item_id"] == 20 * 16 * 4


def test_without_held_out_labels_the_other_stages_run(tmp_path, caplog):
    log = write_click_log(tmp_path / "log", parts=("train",))
    train = click_config("", "", epochs=1)
    config = PipelineModelConfig(data=log, out=str(tmp_path / "out"), schema=SCHEMA, train=train)
    caplog.set_level("INFO")
    assert pipeline(config) == ["train"]
    assert "no held-out rows, so nothing is evaluated" in caplog.text


BAD = [
    ('[train]\nmodel = "dlrm"\n[train.features.shoe]', [], "has no column 'shoe'"),
    ('[train]\nmodel = "dlrm"\n[train.features.user_id]\nfrozen = 3', [], "'train.features.user_id.frozen' is 3"),
    ('[train]\nmodel = "evil:make"', [], "train.model is 'evil:make' in the configuration file"),
    ('[train.model]\nname = "evil:make"', [], "train.model is 'evil:make' in the configuration file"),
    ('[train]\nmodel = "dlrm"\nfactory = "evil:make"', [], "'train.factory': a module is imported only if"),
    ('[evaluate]\nfactory = "evil:make"', [], "'evaluate.factory': a module is imported only if"),
    ('stages = ["factorize", "train"]\n[train]\nmodel = "dlrm"', [], "stages: nothing uses the factors"),
    ('[train]\nmodel = "dlmr"', [], "train.model is 'dlmr' in the configuration file"),
    ("", ["--train.model", "dlmr"], "--model dlmr: nearest is 'dlrm'"),
    ("", ["--train.model"], "--train.model: expected one of"),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD)
def test_what_does_not_fit_is_one_line_before_any_stage(log, text, options, message, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(text)
    command = ["pipeline", "--data", log, "--out", str(tmp_path / "out"), "--config", str(tmp_path / "run.toml")]
    assert main([*command, "--schema.label", "click", *options]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_a_log_without_a_label(log, tmp_path, capsys):
    command = ["pipeline", "--train.model", "dlrm", "--data", log, "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "no label; expected --schema.label" in capsys.readouterr().err


def test_the_factors_of_a_pipeline_are_refused_elsewhere(log, tmp_path, capsys):
    (tmp_path / "train.toml").write_text('model = "dlrm"\n[features.user_id]\nfrozen = "@factorize"')
    command = ["--data", log, "--schema.label", "click", "--config", str(tmp_path / "train.toml")]
    for name in ("train", "plan"):
        assert main([name, *command, "--out", str(tmp_path / "out")]) == 2
        assert "frozen is '@factorize', the factors of `recpress pipeline`" in capsys.readouterr().err
