"""The main job, stage by stage, on a small synthetic log: on one rank, on two, and on bad input."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from recpress.data.config import NegativesConfig, SampleConfig, Schema, StreamConfig, SynthConfig
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.als.factors import FactorTable
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.config import EvaluationConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

ALS = ALSConfig(factors=16, sweeps=8)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """800 users x 600 items, 24,000 rows with planted tastes."""
    made = SynthConfig(users=800, items=600, rows=24_000, tastes=8, tastes_per_user=4)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    factorize(FactorizeConfig(data=log, out=out, als=ALS, crossfit_rate=0.2, crossfit_seed=3))
    return out


def network(log, out, factors=None, **changes):
    settings = {
        "stream": StreamConfig(batch_size=256),
        "negatives": NegativesConfig(count=64, shared=True, reject_positives="yes"),
        "model": TwoTowerConfig(
            tables=TablesConfig(strategy="frozen" if factors else "random", dim=16),
            towers=TowersConfig(kind="residual" if factors else "mlp", hidden=(32,), dim=16),
            loss=LossConfig(kind="softmax"),
        ),
        "sample": SampleConfig(rate=0.2, seed=3),
        "epochs": 2,
        "tensorboard": False,
    }
    return TrainConfig(data=log, out=str(out), factors=factors, **{**settings, **changes})


def test_factorization_beats_popularity_by_a_wide_margin(log, factors):
    metrics = evaluate(EvaluateConfig(data=log, model=factors))
    assert metrics["HR@10"] > 0.55  # popularity: 0.41


def test_an_interrupt_keeps_the_sweeps_that_were_done(log, tmp_path):
    """Ctrl-C in one of the first sweeps of many: those that were done are what as many sweeps give."""
    out = tmp_path / "factors"
    command = [sys.executable, "-m", "recpress.trainer.cli", "factorize", "--data", log, "--out", str(out)]
    command += ["--als.factors", "8", "--als.sweeps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "sweep 1 of" in line:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    sweeps = json.loads((out / "manifest.json").read_text())["seconds"]["sweeps"]
    assert 1 <= len(sweeps) < 100_000
    als = ALSConfig(factors=8, sweeps=len(sweeps))
    factorize(FactorizeConfig(data=log, out=str(tmp_path / "as-many"), als=als))
    for side in ("user", "item"):
        np.testing.assert_allclose(FactorTable(out, side)[:], FactorTable(tmp_path / "as-many", side)[:], atol=1e-5)


def test_the_full_protocol_ranks_all_items(log, factors, tmp_path):
    out = tmp_path / "metrics.json"
    look = EvaluationConfig(protocol="full", k=(5, 10))
    metrics = evaluate(EvaluateConfig(data=log, model=factors, evaluation=look, out=str(out)))
    assert json.loads(out.read_text()) == metrics
    assert 0 < metrics["Recall@5"] < metrics["Recall@10"] < 1


def test_frozen_tables_are_the_factors_of_all_rows_bit_for_bit_after_training(log, factors, tmp_path):
    train(network(log, tmp_path / "cadc", factors))
    for side in ("user", "item"):
        files = sorted((tmp_path / "cadc" / "weights" / "tables").glob(f"*{side}_frozen*{side}.frozen/*.npy"))
        saved = np.concatenate([np.load(path) for path in files])
        np.testing.assert_array_equal(saved[:, :16], FactorTable(factors, side)[:])


def test_a_model_evaluates_as_it_did_at_the_end_of_training(log, factors, tmp_path):
    for strategy in ("random", "warm-start", "frozen", "frozen+residual"):
        start = None if strategy == "random" else factors
        config = network(log, tmp_path / strategy, start)
        config = replace(config, model=replace(config.model, tables=TablesConfig(strategy=strategy, dim=16)))
        result = train(config)
        assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / strategy))) == result.metrics


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_frozen_rows_may_be_stored_in_fewer_bits(log, factors, storage, tmp_path):
    config = network(log, tmp_path / storage, factors)
    tables = TablesConfig(strategy="frozen", storage=storage)
    result = train(replace(config, model=replace(config.model, tables=tables)))
    full = train(network(log, tmp_path / "fp32", factors))
    assert abs(result.metrics["HR@10"] - full.metrics["HR@10"]) < 0.03
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / storage))) == result.metrics


def test_the_same_seed_gives_the_same_weights(log, factors, tmp_path):
    for name in ("a", "b"):
        train(network(log, tmp_path / name, factors))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "weights").rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_side_features_join_the_towers(log, factors, tmp_path):
    features = {"item_features": ("genres", "price"), "user_features": ("country",)}
    config = network(log, tmp_path / "features", factors, **features)
    result = train(config)
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "features"))) == result.metrics


def _both(log, factors, out):
    factorize(FactorizeConfig(data=log, out=f"{out}/factors", als=ALS, crossfit_rate=0.2, crossfit_seed=3))
    train(network(log, f"{out}/model", f"{out}/factors"))
    return evaluate(EvaluateConfig(data=log, model=f"{out}/model"))


def test_two_ranks_factorize_train_and_evaluate_as_one(log, factors, tmp_path):
    of_ranks = run_on_ranks(_both, 2, log, factors, str(tmp_path))
    assert of_ranks[0] == of_ranks[1]
    # the checkpoint of two ranks, ranked by one: the same to the last bit
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model"))) == of_ranks[0]
    for side in ("user", "item"):
        table = FactorTable(tmp_path / "factors", side)[:]
        np.testing.assert_allclose(table, FactorTable(factors, side)[:], atol=1e-4)


def write(folder, name, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def plain_log(folder, users=(0, 0, 1, 1), items=(0, 1, 1, 2)):
    write(folder, "train", user_id=list(users), item_id=list(items))
    write(folder, "test", user_id=[0, 1], item_id=[2, 0])
    return str(folder)


def test_a_label_that_is_no_probability_is_refused(tmp_path):
    folder = tmp_path / "log"
    write(folder, "train", user_id=[0, 0, 1, 1], item_id=[0, 1, 1, 2], stars=[1.0, 5.0, 0.0, 0.5])
    config = TrainConfig(
        data=str(folder),
        out=str(tmp_path / "model"),
        schema=Schema(label="stars"),
        sample=SampleConfig(rate=1.0),
        model=TwoTowerConfig(tables=TablesConfig(strategy="random", dim=4)),
        negatives=NegativesConfig(count=1),
        use_label=True,
        epochs=1,
        tensorboard=False,
    )
    with pytest.raises(InputError, match=r"log/train.*, row group 0, column 'stars', row 1: 5.0; .*in \[0, 1\]"):
        train(config)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("stars", "message"), [([1.0, -1.0], "column 'stars', row 1: -1.0"), ([0.0, 0.0], "are 0")])
def test_labels_that_a_factorization_cannot_weigh_by_are_refused(tmp_path, stars, message):
    write(tmp_path / "log", "train", user_id=[0, 1], item_id=[0, 1], stars=stars)
    config = FactorizeConfig(data=str(tmp_path / "log"), out=str(tmp_path / "f"), schema=Schema(label="stars"))
    with pytest.raises(ValueError, match=message):
        factorize(replace(config, use_label=True))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleConfig(rate=0.0), "sample.rate is 0.0"),
        (lambda: FactorizeConfig(data="log", out="out", als=ALSConfig(sweeps=0)), "als.sweeps is 0"),
        (
            lambda: TrainConfig(data="log", out="out", model=TwoTowerConfig(tables=TablesConfig(dim=0))),
            "tables.dim is 0",
        ),
        (lambda: TrainConfig(data="log", out="out", model=TwoTowerConfig(towers=TowersConfig(dropout=1.0))), "dropout"),
        (lambda: SampleConfig(rate=1.5), "sample.rate is 1.5"),
        (lambda: SampleConfig(rate=float("nan")), "sample.rate is nan"),
        (lambda: NegativesConfig(kind="in-batch", shared=True), "negatives.shared"),
        (lambda: EvaluationConfig(k=(0,)), "k is 0"),
        (lambda: EvaluationConfig(metric="FOO@3"), "evaluation.metric is 'FOO@3', expected HR@K, NDCG@K"),
        (lambda: EvaluationConfig(metric="cases"), "evaluation.metric is 'cases'"),
        (lambda: EvaluationConfig(metric="NDCG@0"), "evaluation.metric is 'NDCG@0'"),
        (lambda: EvaluationConfig(metric="MRR@5"), "evaluation.metric is 'MRR@5'"),
        (lambda: FactorizeConfig(data="a", out="b", crossfit_rate=1.0), "crossfit_rate is 1.0"),
        (lambda: TrainConfig(data="a", out="b", epochs=-1), "epochs is -1"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_read(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_existing_result_is_not_overwritten_unless_asked(log, factors):
    with pytest.raises(InputError, match="exists already"):
        factorize(FactorizeConfig(data=log, out=factors, als=ALS))


@pytest.mark.parametrize("damage", ["truncated", "null", "negative", "missing column"])
def test_bad_data_on_one_rank_ends_all_ranks_with_the_place(tmp_path, damage):
    """Two files: the second is bad, so one rank alone meets it."""
    folder = tmp_path / "log"
    users, items = [0, 1] * 50, [0, 1, 2, 0] * 25
    write(folder / "train", "a", user_id=users, item_id=items)
    bad = {"null": [None, *users[1:]], "negative": [-1, *users[1:]]}.get(damage, users)
    if damage == "missing column":
        write(folder / "train", "b", user=users, item_id=items)
    else:
        pq.write_table(
            pa.table({"user_id": bad, "item_id": items}), folder / "train" / "b.parquet", write_statistics=False
        )
    if damage == "truncated":
        path = folder / "train" / "b.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    write(folder, "test", user_id=[0, 1], item_id=[1, 2])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["recpress.trainer.cli", "factorize", "--data", str(folder), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode != 0
    assert "b.parquet" in done.stderr
    assert "[rank 0]: error:" in done.stderr
    assert "[rank 1]: error:" in done.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_no_model_outlives_its_process_group(log, factors, tmp_path, monkeypatch):
    """DDP's reducer would hold the group, whose destructor could then wait for gloo's threads for ever."""
    left = []
    destroy = dist.destroy_process_group

    def look():
        left.append([type(found) for found in gc.get_objects() if type(found) is DistributedDataParallel])
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", look)
    train(network(log, tmp_path / "model", factors, epochs=1))
    evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model")))
    assert left == [[], []]
