"""A run that starts from the weights of an earlier one: by name, by raw id, on one rank and on two, and bad input."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import IngestConfig, NegativesConfig, SampleConfig, Schema, StreamConfig
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.cli import main
from recpress.trainer.config import CheckpointConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from recpress.trainer.errors import Preempted
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.model.config import DLRMConfig
from recpress.trainer.train.config import HeldOutConfig, TrainModelConfig
from recpress.trainer.train.model_stage import train_model
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

STILL = OptimizerConfig(learning_rate=1e-30, table_learning_rate=1e-30)
"""A run with it publishes the weights that it started with."""


def clicks(rng, users, items, rows=3_000):
    """Raw ids 1000 + u and "i<k>"; users like items of their own parity."""
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    like = rng.random(rows) < np.where((user + item) % 2 == 0, 0.85, 0.15)
    return pa.table(
        {
            "user_id": 1000 + user,
            "item_id": [f"i{k}" for k in item],
            "click": like.astype(np.int8),
            "price": rng.lognormal(3, 1, rows),
            "city": rng.integers(0, 5, rows),
        }
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """`old`; `extended`, whose vocabularies continue those of `old`; `renumbered`, with another order of the ids."""
    folder, rng = tmp_path_factory.mktemp("logs"), np.random.default_rng(0)
    first, more = clicks(rng, 30, 20), clicks(rng, 40, 26)
    pq.write_table(first, folder / "first.parquet")
    pq.write_table(more, folder / "more.parquet")
    columns = {"user": "user_id", "item": "item_id", "label": "click", "floats": ("price",), "categorical": ("city",)}
    made = {}
    for name, source, extend in (("old", "first", None), ("extended", "more", "old"), ("renumbered", "more", None)):
        given = {**columns, "input": str(folder / f"{source}.parquet"), "format": "parquet"}
        made[name] = str(folder / name)
        ingest(IngestConfig(**given, extend=extend and made[extend]), made[name])
    return made


def config(data, out, **changes):
    settings = {"stream": StreamConfig(batch_size=250), "epochs": 1, "tensorboard": False, "dim": 8}
    settings |= {"evaluation": HeldOutConfig(every=0), "model": DLRMConfig(dense_layers=(8,), over_layers=(8,))}
    return TrainModelConfig(data=data, out=str(out), factory="dlrm", **{**settings, **changes})


@pytest.fixture(scope="module")
def earlier(logs, tmp_path_factory):
    out = tmp_path_factory.mktemp("earlier") / "model"
    train_model(config(logs["old"], out, epochs=2))
    return str(out)


def table(model, name):
    """All rows of a table of a saved model."""
    (folder,) = Path(model).glob(f"weights/tables/*embedding_bags.{name}.weight")
    parts = [(list(map(int, path.stem.split("-")[1:3] + path.stem.split("-")[4:6])), path) for path in folder.iterdir()]
    whole = np.full((max(p[0][1] for p in parts), max(p[0][3] for p in parts)), np.nan, np.float32)
    for (r0, r1, c0, c1), path in parts:
        whole[r0:r1, c0:c1] = np.load(path)
    assert not np.isnan(whole).any()
    return whole


def dense(model):
    return torch.load(Path(model) / "weights" / "dense.pt", weights_only=True)


def raw(log, side):
    return pq.read_table(f"{log}/vocabulary/{side}.parquet").column("raw").to_pylist()


def check_rows(model, before, log, old_log, side, column):
    """Rows of ids that both logs have are those of the earlier model; the others are their mean."""
    then, now = table(before, column), table(model, column)
    place = {value: k for k, value in enumerate(raw(old_log, side))}
    ids = [place.get(value, -1) for value in raw(log, side)]
    known = np.array(ids) >= 0
    assert 0 < known.sum() < len(ids) == len(now)
    np.testing.assert_array_equal(now[known], then[np.array(ids)[known]])
    np.testing.assert_allclose(now[~known], np.tile(now[known].mean(0), ((~known).sum(), 1)), atol=1e-6)


def _train(settings):
    return (train_model if isinstance(settings, TrainModelConfig) else train)(settings).rows


@pytest.mark.parametrize(("name", "world"), [("extended", 1), ("renumbered", 2)])
def test_rows_go_to_their_raw_ids_and_new_rows_are_the_mean(logs, earlier, name, world, tmp_path, caplog):
    out = str(tmp_path / "model")
    by_rows = {name: FeatureConfig(sharding="row_wise") for name in ("user_id", "city")}
    by_rows |= {"item_id": FeatureConfig(sharding="column_wise"), "price": FeatureConfig()}
    order = {name: by_rows[name] for name in ("user_id", "item_id", "city", "price")}
    caplog.set_level("INFO")
    run_on_ranks(
        _train, world, config(logs[name], out, warm_start=earlier, optimizer=STILL, features=order), timeout=600
    )
    check_rows(out, earlier, logs[name], logs["old"], "user", "user_id")
    check_rows(out, earlier, logs[name], logs["old"], "item", "item_id")
    for key, value in dense(earlier).items():
        torch.testing.assert_close(dense(out)[key], value, rtol=0, atol=0)
    then, now = (
        json.loads((Path(model) / "manifest.json").read_text())["model"]["numbers"] for model in (earlier, out)
    )
    assert then == now  # the network was trained on numbers that these statistics standardize
    if world == 1:
        assert "user_id: 30 rows, and 10 new rows as the mean of these" in caplog.text
        assert "not from" not in caplog.text


def test_the_log_of_the_earlier_model_is_needed_only_if_ids_moved(logs, earlier, tmp_path):
    gone = Path(logs["old"]).rename(tmp_path / "gone")
    try:
        train_model(config(logs["extended"], tmp_path / "extended", warm_start=earlier, optimizer=STILL))
        with pytest.raises(
            InputError,
            match=r"table '.*': .*vocabulary/.*, the vocabulary of the earlier model, is missing; expected that log",
        ):
            train_model(config(logs["renumbered"], tmp_path / "renumbered", warm_start=earlier))
    finally:
        gone.rename(logs["old"])
    np.testing.assert_array_equal(table(tmp_path / "extended", "user_id")[:30], table(earlier, "user_id"))


def test_a_warm_start_is_better_than_the_first_epoch_of_a_cold_one(logs, earlier, tmp_path):
    run = config(logs["old"], tmp_path / "cold", evaluation=HeldOutConfig())
    cold = train_model(run)
    warm = train_model(replace(run, out=str(tmp_path / "warm"), warm_start=earlier))
    assert warm.fit.evaluations[0]["step"] == 0
    assert warm.fit.evaluations[0]["LogLoss"] < cold.fit.evaluations[0]["LogLoss"]


def test_names_of_tables_and_parameters_are_mapped_and_omitted(logs, earlier, tmp_path, caplog):
    features = {
        "member": FeatureConfig(column="user_id"),
        "item_id": FeatureConfig(),
        "city": FeatureConfig(),
        "price": FeatureConfig(),
    }
    names = ("member=user_id", "item_id=", "model.network.over_arch=")
    run = config(logs["old"], tmp_path / "model", features=features, optimizer=STILL, warm_start=earlier)
    caplog.set_level("INFO")
    train_model(replace(run, warm_start_names=names))
    np.testing.assert_array_equal(table(tmp_path / "model", "member"), table(earlier, "user_id"))
    assert not np.array_equal(table(tmp_path / "model", "item_id"), table(earlier, "item_id"))
    now, then = dense(tmp_path / "model"), dense(earlier)
    omitted = [key for key in now if not torch.equal(now[key], then[key])]
    assert omitted
    assert all(key.startswith("model.network.over_arch") for key in omitted)
    (line,) = [record.getMessage() for record in caplog.records if "not from" in record.getMessage()]
    assert "table 'item_id' (omitted)" in line
    assert all(f"'{key}' (omitted)" in line for key in omitted)
    assert "embedding_bags.item_id.weight are not used" in line


def hashed(rows, method="universal"):
    return {
        "user_id": FeatureConfig(hash=FeatureHash(method=method, rows=rows)),
        "item_id": FeatureConfig(),
        "price": FeatureConfig(),
    }


def test_a_hashed_table_needs_the_same_map(logs, tmp_path):
    before = str(tmp_path / "before")
    train_model(config(logs["old"], before, features=hashed(12)))
    same = config(logs["old"], tmp_path / "same", features=hashed(12), warm_start=before, optimizer=STILL)
    train_model(same)
    np.testing.assert_array_equal(table(tmp_path / "same", "user_id"), table(before, "user_id"))
    train_model(replace(same, data=logs["extended"], out=str(tmp_path / "extended")))  # the formula is that of more ids
    np.testing.assert_array_equal(table(tmp_path / "extended", "user_id"), table(before, "user_id"))
    for data, features in (
        ("old", hashed(13)),
        ("old", hashed(12, "frequency")),
        ("old", {**hashed(12), "user_id": FeatureConfig()}),
        ("renumbered", hashed(12)),
    ):
        with pytest.raises(
            InputError, match=r"table 'user_id': its ids share rows by another map \(fingerprint"
        ) as found:
            train_model(replace(same, data=logs[data], out=str(tmp_path / "bad"), features=features))
        assert "\n" not in str(found.value)
    assert not (tmp_path / "bad").exists()


def stop_at(step):
    """Make the stream of features send SIGTERM at a step."""
    call = FeatureBatches.__call__

    def stopping(self, rows):
        if rows.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, rows)

    FeatureBatches.__call__ = stopping
    return call


def stopped(run, step):
    call = stop_at(step)
    try:
        with pytest.raises(Preempted):
            train_model(run)
    finally:
        FeatureBatches.__call__ = call


def test_a_resumed_run_keeps_its_weights_and_a_checkpoint_starts_another_run(logs, earlier, tmp_path, caplog):
    run = config(logs["old"], tmp_path / "whole", epochs=3, warm_start=earlier)
    train_model(run)
    again = replace(run, out=str(tmp_path / "stopped"), checkpoint=CheckpointConfig(steps=2))
    stopped(again, 7)
    other = replace(run, out=str(tmp_path / "other"), warm_start=f"{tmp_path}/stopped.checkpoints", optimizer=STILL)
    newest = max(Path(f"{tmp_path}/stopped.checkpoints").glob("step-*"))
    train_model(replace(other, epochs=1))
    assert not np.array_equal(table(other.out, "city"), table(earlier, "city"))
    train_model(replace(other, epochs=1, out=str(tmp_path / "direct"), warm_start=str(newest)))
    np.testing.assert_array_equal(table(tmp_path / "direct", "city"), table(other.out, "city"))
    caplog.clear()
    caplog.set_level("INFO")
    train_model(again)
    assert "warm start" not in caplog.text
    np.testing.assert_array_equal(table(again.out, "user_id"), table(run.out, "user_id"))
    for key, value in dense(run.out).items():
        torch.testing.assert_close(dense(again.out)[key], value, rtol=0, atol=0)


BAD = {
    "no model": ({"warm_start": "nowhere"}, "nowhere"),
    "dense shape": (
        {"model": DLRMConfig(dense_layers=(4,), over_layers=(8,))},
        r"'model.network.dense_arch.*' has shape \(4,.*\), but it in .* has \(8,.*\); expected the same network",
    ),
    "dimension": (
        {"dim": 16},
        r"table '.*' has shape \(\d+, 16\), but \(\d+, 8\) in .*; expected dimension 8, or --warm-start-names",
    ),
    "order": (
        {"features": {name: FeatureConfig() for name in ("item_id", "user_id", "city", "price")}},
        "features: item_id, user_id, city are in another order than in .*reads them as user_id, item_id, city",
    ),
    "unknown new": ({"warm_start_names": ("shoe=user_id",)}, "shoe=user_id: this model has no 'shoe'; nearest: "),
    "unknown old": ({"warm_start_names": ("user_id=shoe",)}, "the earlier model has no 'shoe'"),
}


def _errors(old, out, earlier):
    found = []
    for changes, _ in BAD.values():
        try:
            train_model(config(old, out, **{"warm_start": earlier, **changes}))
        except InputError as error:
            found.append(str(error))
    return found


def test_bad_input_is_the_same_line_on_every_rank(logs, earlier, tmp_path):
    first, second = run_on_ranks(_errors, 2, logs["old"], str(tmp_path / "model"), earlier, timeout=600)
    assert first == second
    assert len(first) == len(BAD)
    for line, (_, message) in zip(first, BAD.values(), strict=True):
        assert re.search(message, line), line
        assert "\n" not in line


def test_a_table_without_its_last_shard_is_damaged(logs, earlier, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(earlier, damaged)
    (shard,) = damaged.glob("weights/tables/*embedding_bags.user_id.weight/*.npy")
    half = np.load(shard)[:15]
    shard.unlink()
    np.save(shard.with_name(shard.name.replace("rows-0-30-", "rows-0-15-")), half)
    with pytest.raises(InputError, match=r"15 rows in .*30 ids; the last shards"):
        train_model(config(logs["old"], tmp_path / "model", warm_start=str(damaged)))


def test_a_table_without_any_shard_is_damaged(logs, earlier, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(earlier, damaged)
    (folder,) = damaged.glob("weights/tables/*embedding_bags.user_id.weight")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"no rows of 'user_id', which its manifest describes; .* damaged"):
        train_model(config(logs["old"], tmp_path / "model", warm_start=str(damaged)))


def test_buckets_keep_their_boundaries_or_are_other_ids(logs, tmp_path):
    features = {"user_id": FeatureConfig(), "bin": FeatureConfig(column="price", kind="bucketized", buckets=5)}
    before = str(tmp_path / "before")
    train_model(config(logs["old"], before, features=features))
    run = config(logs["extended"], tmp_path / "same", features=features, warm_start=before, optimizer=STILL)
    train_model(run)
    np.testing.assert_array_equal(table(tmp_path / "same", "bin"), table(before, "bin"))
    other = features | {"bin": FeatureConfig(column="price", kind="bucketized", boundaries=(1.0, 2.0, 3.0, 4.0))}
    with pytest.raises(InputError, match="table 'bin': its ids are numbered or hashed otherwise"):
        train_model(replace(run, features=other, out=str(tmp_path / "other")))


def test_dense_ids_without_a_vocabulary_are_the_first_of_more(tmp_path):
    rng = np.random.default_rng(1)
    for name, users in (("old", 30), ("grown", 40), ("shrunk", 20)):
        rows = clicks(rng, users, 20).to_pydict()
        rows["user_id"], rows["item_id"] = [k - 1000 for k in rows["user_id"]], [int(k[1:]) for k in rows["item_id"]]
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(rows), tmp_path / name / "train.parquet")
    schema = Schema(label="click", floats=("price",))
    run = config(str(tmp_path / "old"), tmp_path / "model", schema=schema)
    train_model(run)
    warm = replace(run, warm_start=run.out, optimizer=STILL)
    train_model(replace(warm, data=str(tmp_path / "grown"), out=str(tmp_path / "warm")))
    np.testing.assert_array_equal(table(tmp_path / "warm", "user_id")[:30], table(run.out, "user_id"))
    with pytest.raises(
        InputError, match="table 'user_id': 20 ids, but the earlier model has 30, and neither log has a"
    ):
        train_model(replace(warm, data=str(tmp_path / "shrunk"), out=str(tmp_path / "bad")))


# ---- the two-tower network


def towers(data, out, strategy="random", factors=None, **changes):
    settings = {
        "stream": StreamConfig(batch_size=128),
        "negatives": NegativesConfig(count=8, shared=True),
        "model": TwoTowerConfig(
            tables=TablesConfig(strategy=strategy, dim=8),
            towers=TowersConfig(kind="residual", hidden=(8,), dim=8),
            loss=LossConfig(kind="softmax"),
        ),
        "evaluation": EvaluationConfig(every=0),
        "sample": SampleConfig(rate=1.0),
        "epochs": 1,
        "tensorboard": False,
    }
    return TrainConfig(data=data, out=str(out), factors=factors, **{**settings, **changes})


@pytest.mark.parametrize("world", [1, 2])
def test_the_two_towers_start_from_earlier_ones(logs, world, tmp_path):
    before = str(tmp_path / "before")
    train(towers(logs["old"], before))
    out = str(tmp_path / "after")
    run = towers(logs["renumbered"], out, warm_start=before, optimizer=replace(STILL, schedule="constant"))
    run_on_ranks(_train, world, run, timeout=600)
    check_rows(out, before, logs["renumbered"], logs["old"], "user", "user")
    check_rows(out, before, logs["renumbered"], logs["old"], "item", "item")
    for key, value in dense(before).items():
        torch.testing.assert_close(dense(out)[key], value, rtol=0, atol=0)


def write_factors(data, out, vectors):
    """What `recpress factorize` leaves, with these vectors by raw id."""
    factorize(FactorizeConfig(data=data, out=str(out), als=ALSConfig(factors=8, sweeps=1)))
    for side in ("user", "item"):
        rows = np.stack([vectors[value] for value in raw(data, side)])
        np.save(Path(out) / f"{side}-00000-of-00001.npy", rows.astype(np.float32))
    return str(out)


def test_rows_of_new_ids_are_their_factors_in_the_space_of_the_earlier_rows(logs, tmp_path, caplog):
    """The second factorization is the first, rotated: mapped back, new ids have their vectors of the first space."""
    rng = np.random.default_rng(3)
    vectors = {value: rng.normal(size=8) for side in ("user", "item") for value in raw(logs["renumbered"], side)}
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    first = write_factors(logs["old"], tmp_path / "first", vectors)
    second = write_factors(logs["renumbered"], tmp_path / "second", {k: v @ turn for k, v in vectors.items()})
    still = replace(STILL, schedule="constant")
    before, out = str(tmp_path / "before"), str(tmp_path / "after")
    train(towers(logs["old"], before, "warm-start", first, optimizer=still))
    caplog.set_level("INFO")
    train(towers(logs["renumbered"], out, "warm-start", second, optimizer=still, warm_start=before))
    assert "new rows as their factors, mapped to the space of these" in caplog.text
    for side in ("user", "item"):
        want = np.stack([vectors[value] for value in raw(logs["renumbered"], side)])
        np.testing.assert_allclose(table(out, side), want, atol=1e-3)


def test_frozen_rows_are_those_that_the_towers_were_trained_on(logs, tmp_path):
    factors = {}
    for name in ("one", "two"):
        factors[name] = str(tmp_path / name)
        seed = len(factors)
        factorize(FactorizeConfig(data=logs["old"], out=factors[name], als=ALSConfig(factors=8, sweeps=2, seed=seed)))
    before = str(tmp_path / "before")
    train(towers(logs["old"], before, "frozen+residual", factors["one"]))
    still = replace(STILL, schedule="constant")
    run = towers(logs["old"], tmp_path / "after", "frozen+residual", factors["one"], warm_start=before, optimizer=still)
    train(run)
    np.testing.assert_array_equal(table(run.out, "user_plus"), table(before, "user_plus"))
    with pytest.raises(InputError, match="table 'user': the earlier model was trained on other frozen rows"):
        train(replace(run, factors=factors["two"], out=str(tmp_path / "bad")))


def test_a_warm_start_that_is_worse_than_the_factorization_publishes_that(logs, tmp_path):
    factors = str(tmp_path / "factors")
    factorize(FactorizeConfig(data=logs["old"], out=factors, als=ALSConfig(factors=8, sweeps=2)))
    before = str(tmp_path / "before")
    mlp = towers(logs["old"], before, "frozen", factors)
    random = replace(mlp, optimizer=OptimizerConfig(learning_rate=0.05, table_learning_rate=0.1), epochs=1)
    train(random)
    run = replace(mlp, out=str(tmp_path / "after"), warm_start=before, evaluation=EvaluationConfig(every=1))
    result = train(replace(run, crossfit="no", epochs=1))
    assert result.fallback
    assert result.metrics == result.factorization


def test_options(logs, earlier, tmp_path, capsys):
    command = ["train", "--model", "dlrm", "--data", logs["old"], "--out", str(tmp_path / "model"), "--dim", "8"]
    assert main([*command, "--warm-start-names", "a=b"]) == 2
    assert "without --warm-start" in capsys.readouterr().err
    assert main([*command, "--warm-start", earlier, "--warm-start-names", "user_id"]) == 2
    assert "'user_id', expected NEW=OLD" in capsys.readouterr().err
    (tmp_path / "run.toml").write_text(f'warm_start = "{earlier}"\nwarm_start_names = ["city="]\n')
    assert main(["check", *command, "--config", str(tmp_path / "run.toml")]) == 0
