"""Stages on a log that `recpress sample` wrote: the rows, the factors and the evaluation that belong to it."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.cli import main
from recpress.trainer.config import EvaluationConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.plan.config import PlanConfig
from recpress.trainer.plan.job import job_of
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

ALS = ALSConfig(factors=8, sweeps=2)
KINDS = ("rows", "block", "user")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = SynthConfig(users=200, items=150, rows=4_000, tastes=4, tastes_per_user=2, negatives=20)
    made = replace(made, layout=replace(made.layout, row_group_rows=250))
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="module", params=KINDS)
def made(log, request, tmp_path_factory):
    """A sample of each kind, streamed and written, and factors made without it."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    part, factors = str(folder / "part"), str(folder / "factors")
    options = ["--sample.kind", kind, "--sample.rate", "0.3", "--sample.seed", "5"]
    assert main(["sample", "--data", log, "--out", part, *options]) == 0
    options = ["--crossfit-kind", kind, "--crossfit-rate", "0.3", "--crossfit-seed", "5", "--device", "cpu"]
    options += ["--als.factors", "8", "--als.sweeps", "2"]
    assert main(["factorize", "--data", log, "--out", factors, *options]) == 0
    return SampleConfig(kind=kind, rate=0.3, seed=5), part, factors


def network(data, out, factors, sample, **changes):
    settings = {
        "stream": StreamConfig(batch_size=64),
        "negatives": NegativesConfig(count=8, shared=True),
        "model": TwoTowerConfig(
            tables=TablesConfig(strategy="frozen"),
            towers=TowersConfig(kind="residual", hidden=(8,), dim=8),
            loss=LossConfig(kind="softmax"),
        ),
        "sample": sample,
        "epochs": 1,
        "tensorboard": False,
        "device": "cpu",
    }
    return TrainConfig(data=data, out=str(out), factors=factors, **{**settings, **changes})


def pairs(data, sample):
    rows = open_log(data)
    stream = InteractionStream(rows.train, rows.schema, StreamConfig(batch_size=64), sample=sample)
    return sorted(pair for batch in stream for pair in zip(batch.user.tolist(), batch.item.tolist(), strict=True))


def test_it_trains_on_exactly_the_streamed_rows_and_on_factors_that_have_not_seen_them(log, made, tmp_path):
    sample, part, factors = made
    assert pairs(part, SampleConfig(rate=1.0)) == pairs(log, sample)
    every = EvaluationConfig(every=0)  # no validation rows, which are drawn by place in the log
    streamed = train(replace(network(log, tmp_path / "streamed", factors, sample, crossfit="yes"), evaluation=every))
    written = network(part, tmp_path / "written", factors, SampleConfig(rate=1.0), crossfit="yes")
    written = train(replace(written, evaluation=every))
    assert streamed.rows == written.rows == len(pairs(log, sample))
    assert written.metrics["HR@10"] > 0
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "written"), device="cpu")) == written.metrics


def test_other_factors_do_not_fit(log, made, tmp_path):
    _, part, factors = made
    seen = str(tmp_path / "seen")
    factorize(FactorizeConfig(data=log, out=seen, als=ALS, device="cpu", crossfit_rate=0.3, crossfit_seed=6))
    opened = open_log(part)
    assert open_factors(factors, opened).has_not_seen(opened, SampleConfig(rate=1.0))
    assert not open_factors(seen, opened).has_not_seen(opened, SampleConfig(rate=1.0))
    # Nor does a sample of another seed do by being asked for the factors' own.
    assert not open_factors(seen, opened).has_not_seen(opened, SampleConfig(rate=0.3, seed=6))
    with pytest.raises(InputError, match=r"made without this very sample \(.*itself a sample\)"):
        train(network(part, tmp_path / "model", seen, SampleConfig(rate=1.0), crossfit="yes"))
    manifest = Path(part) / "manifest.json"
    kept = manifest.read_text()
    try:  # the same sample of other files
        told = json.loads(kept)
        told["sample_of"]["files"][0]["fingerprint"] = "0-0"
        manifest.write_text(json.dumps(told))
        opened = open_log(part)
        assert not open_factors(factors, opened).has_not_seen(opened, SampleConfig(rate=1.0))
    finally:
        manifest.write_text(kept)


def test_factors_of_the_sample_itself_and_of_older_releases(log, made, tmp_path):
    _, part, _ = made
    own = str(tmp_path / "own")
    factorize(FactorizeConfig(data=part, out=own, als=ALS, device="cpu", crossfit_rate=0.5))
    manifest = Path(own) / "manifest.json"
    told = json.loads(manifest.read_text())
    assert told["crossfit"].pop("kind") == "rows"  # which older ones do not name
    manifest.write_text(json.dumps(told))
    opened = open_log(part)
    assert open_factors(own, opened).has_not_seen(opened, SampleConfig(rate=0.5))
    assert not open_factors(own, opened).has_not_seen(opened, SampleConfig(rate=1.0))


def test_all_items_cannot_be_ranked_on_it(log, made, tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    _, part, factors = made
    look = EvaluationConfig(protocol="full")
    with pytest.raises(InputError, match=r"a sample of .*for the protocol 'full' expected that log"):
        evaluate(EvaluateConfig(data=part, model=factors, evaluation=look, device="cpu"))
    bare = tmp_path / "bare"  # held-out rows without negatives: by default nothing is ranked, and it is said
    (bare / "test").mkdir(parents=True)
    for name in ("train/part-00000.parquet", "test/part-00000.parquet"):
        (bare / name).parent.mkdir(exist_ok=True)
        (bare / name).write_bytes((Path(log) / name).read_bytes())
    assert main(["sample", "--data", str(bare), "--out", str(tmp_path / "part"), "--sample.rate", "0.5"]) == 0
    random = network(str(tmp_path / "part"), tmp_path / "model", None, SampleConfig(rate=1.0))
    random = replace(random, model=replace(random.model, tables=TablesConfig(strategy="random", dim=8)))
    assert train(random).metrics == {}
    assert "held-out rows are ranked by `recpress evaluate`" in caplog.text


def test_a_sample_of_a_sample_is_pointed_out(made, tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    _, part, factors = made
    rows = open_log(part).train.num_rows
    result = train(network(part, tmp_path / "model", factors, SampleConfig(rate=0.5)))
    note = f"is a sample already, of which this trains on {result.rows:,} of {rows:,} rows; --sample.rate 1"
    assert note in caplog.text
    assert result.rows < rows


def test_a_plan_counts_the_rows_of_each_kind(log, made):
    sample, part, factors = made
    rows = len(pairs(log, sample))
    of_log = job_of(PlanConfig(data=log, factors=factors, sample=sample))
    of_part = job_of(PlanConfig(data=part, factors=factors, sample=SampleConfig(rate=1.0)))
    assert of_log.sampled == of_part.sampled == rows
    assert of_log.row_vectors == of_part.row_vectors is False  # both would train on cross-fitted factors


def _share(data, sample):
    rows = open_log(data)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = StreamConfig(batch_size=50)
    stream = InteractionStream(rows.train, rows.schema, config, sample=sample, rank=rank, world=world)
    return [pair for batch in stream for pair in zip(batch.user.tolist(), batch.item.tolist(), strict=True)]


def test_ranks_share_what_one_of_them_found(log):
    """Both open a sample by user that nobody has drawn yet; together they read it once, but for the uneven rest."""
    sample = SampleConfig(kind="user", rate=0.2, seed=77)
    shares = run_on_ranks(_share, 2, log, sample)
    wanted = pairs(log, sample)
    found = sorted(shares[0] + shares[1])
    assert len(shares[0]) == len(shares[1]) == len(wanted) // 2
    assert set(found) <= set(wanted)
    assert len(set(found)) == len(found)
