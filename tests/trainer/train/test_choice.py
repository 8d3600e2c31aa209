"""Which network is published: never one that is worse than its factors on the validation rows."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig, SynthConfig
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, LossConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.config import AutoTablesConfig, CheckpointConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.train.choice import Choice, paired_gain
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

HARMFUL = OptimizerConfig(learning_rate=0.3, schedule="constant")
"""Steps so long that the network forgets the factors."""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = SynthConfig(users=800, items=600, rows=24_000, tastes=8, tastes_per_user=4)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    als = ALSConfig(factors=16, sweeps=8, confidence=4.0, regularization=20.0)
    factorize(FactorizeConfig(data=log, out=out, als=als, crossfit_rate=0.2, crossfit_seed=3))
    return out


def config(log, out, factors=None, kind="residual", **changes):
    towers = TowersConfig(kind=kind, hidden=(32,), dim=16, dropout=0.5 if factors else 0.1)
    model = TwoTowerConfig(tables=AutoTablesConfig(dim=16), towers=towers, loss=LossConfig(kind="softmax"))
    settings = {"negatives": NegativesConfig(count=64, shared=True), "epochs": 2, "tensorboard": False}
    return TrainConfig(data=log, out=str(out), factors=factors, model=model, **{**settings, **changes})


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["residual", "mlp"])
def test_a_network_that_is_worse_is_not_published(log, factors, kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    result = train(config(log, tmp_path / "model", factors, kind, optimizer=HARMFUL))
    assert (result.best_epoch, result.fallback) == (0, True)
    assert result.fit.steps > 0
    found = manifest(tmp_path / "model")
    assert (found["best_epoch"], found["fallback"]) == (0, True)
    assert found["validation"]["network"]["NDCG@10"] < found["validation"]["factorization"]["NDCG@10"]
    assert found["validation"]["published"] == found["validation"]["factorization"]["NDCG@10"]
    assert "did not improve on the factorization" in caplog.text
    # what is published ranks the held-out part exactly as the factors do
    of_factors = evaluate(EvaluateConfig(data=log, model=factors))
    assert found["metrics"] == found["factorization_metrics"] == of_factors
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model"))) == of_factors


@pytest.mark.parametrize("kind", ["residual", "mlp"])
def test_a_network_that_cannot_be_compared_is_not_published(log, factors, kind, tmp_path, caplog):
    """A sample of too few rows has no validation rows: the factorization's ranking is kept."""
    few = SampleConfig(rate=0.02)
    result = train(config(log, tmp_path / "model", factors, kind, optimizer=HARMFUL, sample=few))
    assert (result.best_epoch, result.fallback, result.fit.steps) == (0, True, 0)
    assert "too few rows" in caplog.text
    of_factors = evaluate(EvaluateConfig(data=log, model=factors))
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model"))) == of_factors
    unproven = EvaluationConfig(every=0)
    assert train(config(log, tmp_path / "asked", factors, kind, sample=few, evaluation=unproven)).fit.steps > 0


def test_a_network_that_is_better_is_published_with_its_best_epoch(log, factors, tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    result = train(config(log, tmp_path / "model", factors, epochs=4, optimizer=OptimizerConfig(learning_rate=5e-3)))
    found = manifest(tmp_path / "model")
    gains = [look["gain"] for look in result.fit.evaluations]
    assert gains[0] == 0.0
    best = found["best"]
    if found["fallback"]:
        assert not any(
            look["gain"] > look["gain_error"] and look["companion_gain"] >= 0 for look in result.fit.evaluations[1:]
        )
    else:
        assert best["gain"] > best["gain_error"] > 0
        assert best["companion_gain"] >= 0
        assert "improves on the factorization" in caplog.text
    assert found["factorization_metrics"] == evaluate(EvaluateConfig(data=log, model=factors))


def test_factors_that_have_seen_the_rows_leave_nothing_to_choose_on(log, factors, tmp_path, caplog):
    config_ = config(log, tmp_path / "model", factors, crossfit="no")
    result = train(config_)
    assert (result.fit.steps, result.best_epoch, result.fallback) == (0, 0, True)
    assert result.metrics == result.factorization
    assert "crossfit-rate" in caplog.text


def test_a_resumed_run_chooses_as_one_that_was_never_stopped(log, factors, tmp_path, monkeypatch):
    settings = {"epochs": 3, "stream": StreamConfig(batch_size=512), "checkpoint": CheckpointConfig(steps=3, minutes=0)}
    quiet = train(config(log, tmp_path / "quiet", factors, **settings))
    step = TrainOptimizer.step

    def crash(self):
        if self.steps == 10:
            raise RuntimeError
        step(self)

    monkeypatch.setattr(TrainOptimizer, "step", crash)
    with pytest.raises(RuntimeError):
        train(config(log, tmp_path / "crashed", factors, **settings))
    monkeypatch.setattr(TrainOptimizer, "step", step)
    resumed = train(config(log, tmp_path / "crashed", factors, **settings))
    assert quiet.fit.steps == resumed.fit.steps > 10
    assert (resumed.best_epoch, resumed.fallback, resumed.metrics) == (quiet.best_epoch, quiet.fallback, quiet.metrics)
    timeless = [
        [{name: value for name, value in look.items() if name != "train_seconds"} for look in run.fit.evaluations]
        for run in (quiet, resumed)
    ]
    assert timeless[0] == timeless[1]


def test_without_validation_the_last_weights_are_published(log, factors, tmp_path):
    result = train(config(log, tmp_path / "model", factors, evaluation=EvaluationConfig(every=0), optimizer=HARMFUL))
    assert (result.best_epoch, result.fallback, result.validation) == (None, False, {})
    assert result.fit.evaluations == []
    assert result.metrics["NDCG@10"] < result.factorization["NDCG@10"]


def test_a_model_that_is_below_the_factors_on_the_held_out_part_is_named(log, factors, tmp_path, caplog):
    train(config(log, tmp_path / "model", factors, evaluation=EvaluationConfig(every=0), optimizer=HARMFUL))
    assert "below the full factors: NDCG@10" in caplog.text


def test_a_model_no_better_than_popularity_is_named(log, tmp_path, caplog):
    slow = OptimizerConfig(learning_rate=0.0, table_learning_rate=0.0)
    result = train(config(log, tmp_path / "model", optimizer=slow, epochs=1))
    assert result.validation["published"] <= result.validation["popularity"]["NDCG@10"]
    assert "no better than popularity" in caplog.text


def ranked(log, factors, out):
    """On each rank: what a run chose from, and a gain over cases that two ranks share."""
    result = train(config(log, out / "model", factors, optimizer=HARMFUL))
    found = result.validation
    return gains_here(), (result.fallback, found["factorization"], found["popularity"], found["cases"])


def gains_here():
    """Differences 1, 0, 1, 0 over all ranks, and one that is no number."""
    rank = dist.get_rank()
    if dist.get_world_size() == 1:
        network, start = torch.tensor([1.0, 0.0, math.nan, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
        weights = torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0])
    else:
        network = [torch.tensor([1.0, 0.0, math.nan]), torch.tensor([1.0, 1.0])][rank]
        start = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0])][rank]
        weights = [torch.tensor([1.0, 1.0, 9.0]), torch.tensor([1.0, 1.0])][rank]
    return paired_gain(network, start), paired_gain(network, start, weights.double())


def test_the_choice_is_the_same_on_any_number_of_ranks(log, factors, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (alone,) = run_on_ranks(ranked, 1, log, factors, tmp_path / "one")
    assert run_on_ranks(ranked, 2, log, factors, tmp_path / "two") == [alone] * 2
    assert alone == (((0.5, 0.25), (0.5, 0.25)), alone[1])
    assert alone[1][0]


def test_the_error_of_a_weighted_gain():
    """Differences 1 and 0 of weights 3 and 1: mean 3/4, error sqrt(9 / 16 + 9 / 16) / 4."""
    found = paired_gain(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor([3.0, 1.0]).double())
    assert found == pytest.approx((0.75, math.sqrt(9 / 8) / 4))


@pytest.mark.parametrize(
    ("gain", "error", "companion", "accepted"),
    [(0.02, 0.01, 0.0, True), (0.01, 0.01, 0.1, False), (0.02, 0.01, -1e-6, False), (-0.02, 0.01, 0.1, False)],
)
def test_better_is_above_noise_and_not_worse_on_the_companion(gain, error, companion, accepted):
    choice = Choice.__new__(Choice)
    choice.start, choice.seen = {"NDCG@10": 0.5}, False
    found = {"gain": gain, "gain_error": error, "companion_gain": companion}
    assert choice.accepts(found) is accepted
    choice.seen = True
    assert not choice.accepts(found)


@pytest.mark.parametrize(
    ("metric", "full", "companion"),
    [
        ("NDCG@10", False, "HR@10"),
        ("NDCG@20", True, "Recall@20"),
        ("HR@5", False, "NDCG@5"),
        ("UncappedRecall@20", True, "NDCG@20"),
        ("MRR", False, "NDCG@10"),
    ],
)
def test_the_companion_of_a_metric(metric, full, companion):
    look = EvaluationConfig(metric=metric)
    assert look.companion(full) == companion
    assert set(look.during_training().k) >= {10}
    assert np.all(np.diff(look.during_training().k) > 0)
