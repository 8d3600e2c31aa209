"""`factorize --method softmax`: the artifact, cross-fitted factors, resuming, bad input."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, ContrastiveConfig
from recpress.modules.contrastive.factorization import Run
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.cli import main
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.errors import PREEMPTED_STATUS, Preempted, Signalled
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from tests.ranks import run_on_ranks

USERS, ITEMS, GROUPS = 60, 40, 4
SETTINGS = ContrastiveConfig(factors=8, temperature=0.1, epochs=12, batch_users=16, negatives=32)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, 2000)
    items = rng.integers(0, ITEMS // GROUPS, 2000) * GROUPS + users % GROUPS
    users[-1], items[-1] = USERS - 1, ITEMS - 1
    folder = tmp_path_factory.mktemp("log")
    pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / "train.parquet", row_group_size=300)
    return str(folder)


def config(log, out, **settings):
    return FactorizeConfig(data=log, out=str(out), method="softmax", softmax=SETTINGS, **settings)


def tables(out, log, *, crossfit=False):
    opened = open_factors(str(out), open_log(log))
    return [opened.table(side, crossfit=crossfit)[0:100000] for side in ("user", "item")]


def test_the_artifact_has_normalized_rows_and_crossfitted_factors(log, tmp_path):
    result = factorize(config(log, tmp_path / "f", crossfit_rate=0.2))
    assert len(result.sweeps) == SETTINGS.epochs
    assert result.sweeps[-1][0] < result.sweeps[0][0]
    assert result.checks["ok"]
    for crossfit in (False, True):
        users, items = tables(tmp_path / "f", log, crossfit=crossfit)
        np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, rtol=1e-5)
        assert (np.linalg.norm(items, axis=1) > 1.05).all()  # a power of the count
        scores = users @ items.T
        own = np.arange(USERS)[:, None] % GROUPS == np.arange(ITEMS) % GROUPS
        assert scores[own].mean() > scores[~own].mean() + 0.5
    manifest = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert manifest["parameters"]["temperature"] == SETTINGS.temperature
    assert [path.name for path in tmp_path.iterdir()] == ["f"]  # without checkpoints


def stopped_at(epoch, monkeypatch):
    trained = Run._train_epoch

    def train_epoch(self):
        if self.epoch == epoch:
            raise Signalled(15, "SIGTERM")
        return trained(self)

    monkeypatch.setattr(Run, "_train_epoch", train_epoch)


def test_a_stopped_run_resumes_to_the_same_factors(log, tmp_path, monkeypatch):
    saving = CheckpointConfig(steps=3, background=False)
    factorize(config(log, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stopped_at(8, patch)
        with pytest.raises(Preempted, match=r"rerun the same command to resume from .*step-00000006"):
            factorize(config(log, tmp_path / "f", checkpoint=saving))
    assert not (tmp_path / "f").exists()
    other = replace(config(log, tmp_path / "f", checkpoint=saving), softmax=replace(SETTINGS, temperature=0.2))
    with pytest.raises(InputError, match=r"softmax\.temperature"):
        factorize(other)
    result = factorize(config(log, tmp_path / "f", checkpoint=saving))
    assert len(result.sweeps) == SETTINGS.epochs
    for resumed, whole in zip(tables(tmp_path / "f", log), tables(tmp_path / "whole", log), strict=True):
        np.testing.assert_array_equal(resumed, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "whole"]


def test_a_signal_saves_a_checkpoint_after_the_epoch(log, tmp_path, monkeypatch):
    command = ["factorize", "--data", log, "--out", str(tmp_path / "f"), "--method", "softmax"]
    command += ["--softmax.factors", "8", "--softmax.temperature", "0.1", "--softmax.epochs", "12"]
    command += ["--softmax.batch-users", "16", "--softmax.negatives", "32"]
    factorize(config(log, tmp_path / "whole"))
    trained = Run._train_epoch

    def train_epoch(self):
        if self.epoch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return trained(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_epoch", train_epoch)
        assert main(command) == PREEMPTED_STATUS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.checkpoints", "whole"]
    (saved,) = (tmp_path / "f.checkpoints").glob("step-*")
    assert saved.name == "step-00000005"
    assert main(command) == 0
    for resumed, whole in zip(tables(tmp_path / "f", log), tables(tmp_path / "whole", log), strict=True):
        np.testing.assert_array_equal(resumed, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "whole"]


def factorized(made):
    factorize(made)


def test_a_run_resumes_on_another_number_of_ranks(log, tmp_path, monkeypatch):
    saving = CheckpointConfig(steps=3, background=False)
    with monkeypatch.context() as patch:
        stopped_at(8, patch)
        with pytest.raises(Preempted):
            factorize(config(log, tmp_path / "f", checkpoint=saving))
    run_on_ranks(factorized, 2, config(log, tmp_path / "f", checkpoint=saving))
    users, items = tables(tmp_path / "f", log)
    scores = users @ items.T
    own = np.arange(USERS)[:, None] % GROUPS == np.arange(ITEMS) % GROUPS
    assert scores[own].mean() > scores[~own].mean() + 0.5
    assert len(list(Path(tmp_path / "f").glob("user-*.npy"))) == 2


def test_settings_out_of_range_name_the_option(log, tmp_path):
    wrong = replace(SETTINGS, temperature=5.0)
    with pytest.raises(InputError, match=r"temperature is 5\.0, expected 0\.02 to 1"):
        factorize(replace(config(log, tmp_path / "f"), softmax=wrong))
    assert not list(tmp_path.iterdir())


def test_auto_keeps_least_squares_or_takes_softmax_and_says_so(log, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("recpress.modules.contrastive.auto.ROUNDS", ((6, 2), (12, 1)))
    caplog.set_level("INFO")
    made = config(log, tmp_path / "f", crossfit_rate=0.2, als=ALSConfig(factors=8, auto=False))
    result = factorize(replace(made, method="auto", softmax=replace(SETTINGS, temperature=None, epochs=None)))
    manifest = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert manifest["method"] == result.method
    compared = manifest["auto"]["softmax"] if result.method == "als" else manifest["auto"]
    assert set(compared["ndcg"]) == {"als", "softmax"}
    assert len([trial for trial in compared["trials"] if "epochs" in trial]) == 3
    assert compared["runner_up"]["method"] == ({"als", "softmax"} - {result.method}).pop()
    assert len([line for line in caplog.messages if line.startswith(f"auto: {result.method}")]) == 1
    assert manifest["parameters"]["factors"] == 8
    tables(tmp_path / "f", log, crossfit=True)
