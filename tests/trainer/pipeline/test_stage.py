"""The stages in one process group: what is whole is skipped, what does not fit is one error."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig, SynthConfig
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, LossConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.cli import main
from recpress.trainer.config import TrainConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.pipeline.config import PipelineConfig
from recpress.trainer.pipeline.stage import pipeline
from recpress.trainer.pipeline.summary import as_table
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

ALS = ALSConfig(factors=8, sweeps=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = SynthConfig(users=300, items=200, rows=6_000, tastes=4, tastes_per_user=2)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


def settings(log, out, **changes):
    chosen = {
        "stages": ("factorize", "hash", "train", "evaluate"),
        "factorize": FactorizeConfig(data="", out="", als=ALS),
        "hash": HashStageConfig(data="", out="", share=0.5),
        "train": TrainConfig(
            data="",
            out="",
            stream=StreamConfig(batch_size=256),
            negatives=NegativesConfig(count=16, shared=True),
            model=TwoTowerConfig(towers=TowersConfig(kind="mlp", hidden=(8,), dim=8), loss=LossConfig(kind="softmax")),
            sample=SampleConfig(rate=0.5),
            epochs=1,
            tensorboard=False,
        ),
    }
    return PipelineConfig(data=log, out=str(out), **{**chosen, **changes})


@pytest.fixture(scope="module")
def done(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "run"
    assert pipeline(settings(log, out)) == ["factorize", "hash", "train", "evaluate"]
    return out


@pytest.fixture
def copy(done, tmp_path):
    """The finished run under its own name, whatever a test did to it before."""
    kept = tmp_path / "kept"
    shutil.copytree(done, kept)
    yield done
    shutil.rmtree(done)
    shutil.copytree(kept, done)


def weights(model):
    return {str(p.relative_to(model)): p.read_bytes() for p in sorted((model / "weights").rglob("*")) if p.is_file()}


def test_it_makes_what_the_stages_make_one_by_one(log, done, tmp_path):
    alone = settings(log, done, stages=("factorize", "train")).chosen()
    factorize(replace(alone["factorize"], out=str(tmp_path / "factors")))
    hashed = str(done / "maps")
    train(replace(alone["train"], factors=str(tmp_path / "factors"), hash=hashed, out=str(tmp_path / "model")))
    assert weights(tmp_path / "model") == weights(done / "model")
    assert "HR@10" in (done / "metrics.json").read_text()


def test_it_goes_on_at_the_first_stage_that_is_missing(log, copy):
    before = weights(copy / "model")
    assert pipeline(settings(log, copy)) == []
    shutil.rmtree(copy / "model")
    (copy / "metrics.json").unlink()
    assert pipeline(settings(log, copy)) == ["train", "evaluate"]
    assert weights(copy / "model") == before


def test_paths_may_be_spelled_differently(log, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    assert pipeline(settings(f"{log}/", f"{done.name}/")) == []
    assert pipeline(settings(os.path.relpath(log), f"../{done.parent.name}/{done.name}")) == []


def test_another_setting_than_the_artifact_was_made_with_is_named(log, done):
    other = settings(log, done, factorize=FactorizeConfig(data="", out="", als=replace(ALS, factors=16)))
    with pytest.raises(InputError, match=r"factors: made with factorize\.als\.factors = 8 \(now 16\); remove it"):
        pipeline(other)


def test_a_later_result_without_an_earlier_one_is_refused(log, copy):
    shutil.rmtree(copy / "factors")
    with pytest.raises(InputError, match=r"maps: is there, but .*factors, which comes before it, is not"):
        pipeline(settings(log, copy))
    assert not (copy / "factors").exists()


def test_two_ranks_go_on_together(log, copy):
    (copy / "metrics.json").unlink()
    assert run_on_ranks(pipeline, 2, settings(log, copy)) == [["evaluate"]] * 2


def test_one_file_says_it_all(log, tmp_path):
    path = tmp_path / "pipeline.toml"
    path.write_text(
        f'data = "{log}"\nout = "{tmp_path / "run"}"\nstages = ["factorize", "evaluate"]\n'
        "[factorize.als]\nfactors = 8\nsweeps = 1\n[evaluate.evaluation]\nk = [5]\n"
    )
    assert main(["pipeline", "--config", str(path)]) == 0
    assert "HR@5" in (tmp_path / "run" / "metrics.json").read_text()
    assert sorted(p.name for p in Path(tmp_path / "run").iterdir()) == ["factors", "metrics.json"]


def test_a_table_at_the_end_compares_what_was_made_also_when_all_is_complete(log, done, capsys):
    made = json.loads((done / "metrics.json").read_text())
    assert list(made["methods"]) == ["popularity", "factorization", "network"]
    assert made["methods"]["network"]["metrics"]["NDCG@10"] == made["NDCG@10"]
    assert made["methods"]["network"]["rows"] < made["methods"]["factorization"]["rows"]
    capsys.readouterr()
    assert pipeline(settings(log, done)) == []
    text = as_table(made["methods"])
    assert f"held-out rows\n{text}\n" in capsys.readouterr().out
    assert "rows read" in text
    assert f"{made['methods']['popularity']['metrics']['HR@10']:.4f}" in text


def test_held_out_rows_unlike_train_warn_on_stderr(tmp_path, caplog):
    """Held-out rows of new items alone: no method can rank them, and the run says so."""
    caplog.set_level(logging.INFO, "recpress")
    (tmp_path / "log").mkdir()
    rng = np.random.default_rng(0)
    for part, low, high in (("train", 0, 40), ("test", 40, 50)):
        rows = 600 if part == "train" else 30
        columns = {"user_id": rng.integers(0, 30, rows), "item_id": rng.integers(low, high, rows)}
        pq.write_table(pa.table(columns), tmp_path / "log" / f"{part}.parquet")
    config = settings(str(tmp_path / "log"), tmp_path / "run", stages=("factorize", "evaluate"))
    pipeline(config)
    assert "no better than popularity" in caplog.text
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["warnings"]


def test_a_log_of_one_row_is_refused_with_the_cause(tmp_path, capsys):
    pq.write_table(pa.table({"user_id": [0], "item_id": [0]}), tmp_path / "one.parquet")
    assert main(["pipeline", "--data", str(tmp_path / "one.parquet"), "--out", str(tmp_path / "run")]) == 2
    assert "takes all 1 rows" in capsys.readouterr().err


def test_an_output_inside_the_log_leaves_nothing_behind(log, tmp_path):
    shutil.copytree(log, tmp_path / "log")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="is inside the artifact"):
        pipeline(settings(str(tmp_path / "log"), tmp_path / "log" / "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_log_that_was_made_anew_is_noticed_and_the_stale_outputs_are_named(tmp_path):
    made = SynthConfig(users=60, items=150, rows=900, tastes=4, held_out_users=20)
    path = str(synth(made, tmp_path / "log"))
    config = settings(path, tmp_path / "run", stages=("factorize", "evaluate"))
    pipeline(config)
    synth(replace(made, rows=899), path, overwrite=True)
    with pytest.raises(InputError, match="fingerprints differ") as error:
        pipeline(config)
    assert all(str(tmp_path / "run" / name) in str(error.value) for name in ("factors", "metrics.json"))


def test_with_frozen_tables_the_factors_are_cross_fitted_for_the_sample_of_the_network(log):
    plain = PipelineConfig(data=log, out="out").chosen()["factorize"]
    assert (plain.crossfit_rate, plain.crossfit_kind) == (0.1, "rows")
    asked = settings(log, "out").chosen()["factorize"]
    assert asked.crossfit_rate == 0.5
    network = settings(log, "out").train
    for changed in (replace(network, crossfit="no"), replace(network, factors="f")):
        assert settings(log, "out", train=changed).chosen()["factorize"].crossfit_rate == 0


def test_without_held_out_rows_the_other_stages_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    made = SynthConfig(users=60, items=150, rows=900, tastes=4, held_out_users=0)
    path = str(synth(made, tmp_path / "log"))
    factorized = FactorizeConfig(data="", out="", als=ALS)
    assert pipeline(PipelineConfig(data=path, out=str(tmp_path / "run"), stages=("factorize", "evaluate"),
                                   factorize=factorized)) == ["factorize"]  # fmt: skip
    assert "no held-out rows" in caplog.text
