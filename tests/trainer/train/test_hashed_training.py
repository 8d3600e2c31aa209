"""Training on tables that a map of ids compresses: on one rank, on two, and on bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig, SynthConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.als.factors import FactorTable
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_rows import shared_rows
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.artifacts.factors import describe_log
from recpress.trainer.artifacts.id_maps import HASH, ROW_VECTORS, open_maps, save_maps
from recpress.trainer.config import OptimizerConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import TrainLoop
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks
from tests.trainer import small

USERS, ITEMS, DIM = 300, 200, 16
ROWS = {"user": 60, "item": 50}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = SynthConfig(users=USERS, items=ITEMS, rows=9_000, tastes=8, tastes_per_user=4)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    als = ALSConfig(factors=DIM, sweeps=6)
    factorize(FactorizeConfig(data=log, out=out, als=als, crossfit_rate=0.2, crossfit_seed=3))
    return out


def random_map(log, side, rows_per_id=1, weighted=False, rows=None):
    rng = np.random.default_rng(len(side))
    ids, rows = open_log(log).num_ids(side), rows or ROWS[side]
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (ids, rows_per_id)).astype(np.float32)) if weighted else None
    return IdMap(
        rows=torch.from_numpy(rng.integers(rows, size=(ids, rows_per_id)).astype(np.int32)),
        num_rows=rows,
        weights=weights,
        method="random",
        vocabulary=open_log(log).vocabulary_fingerprint(side),
    )


def write_maps(folder, log, maps, vectors=None):
    """What `recpress hash` leaves."""
    with artifact.writing(folder, HASH, {"log": describe_log(open_log(log))}) as tmp:
        save_maps(maps, tmp)
        for side, rows in (vectors or {}).items():
            np.save(tmp / side / ROW_VECTORS, rows)
    return str(folder)


@pytest.fixture(scope="module")
def maps(log, tmp_path_factory):
    """One row an id."""
    folder = tmp_path_factory.mktemp("maps") / "maps"
    return write_maps(folder, log, {side: random_map(log, side) for side in ROWS})


@pytest.fixture(scope="module")
def two_way(log, tmp_path_factory):
    """Users: two weighted rows an id. Items: no map."""
    folder = tmp_path_factory.mktemp("two-way") / "maps"
    return write_maps(folder, log, {"user": random_map(log, "user", 2, weighted=True)})


def network(log, out, factors=None, hashed=None, strategy="frozen", storage="fp32", **changes):
    settings = {
        "stream": StreamConfig(batch_size=256),
        "negatives": NegativesConfig(count=32, shared=True),
        "model": TwoTowerConfig(
            tables=TablesConfig(strategy=strategy, dim=DIM, residual_dim=4, storage=storage),
            towers=TowersConfig(kind="residual", hidden=(32,), dim=DIM),
            loss=LossConfig(kind="softmax"),
        ),
        "sample": SampleConfig(rate=0.2, seed=3),
        "epochs": 1,
        "tensorboard": False,
    }
    return TrainConfig(data=log, out=str(out), factors=factors, hash=hashed, **{**settings, **changes})


def stored(model, table):
    files = sorted((Path(model) / "weights" / "tables").glob(f"*_frozen*.{table}.frozen/*.npy"))
    return np.concatenate([np.load(path) for path in files])


def test_frozen_rows_are_those_that_the_ids_share_bit_for_bit_after_training(log, factors, maps, tmp_path):
    """Cross-fitted while it trains, then of all rows."""
    train(network(log, tmp_path / "model", factors, maps, crossfit="yes"))
    for side in ("user", "item"):
        counts, vectors = FactorTable(factors, f"{side}_count")[:, :], FactorTable(factors, side)[:, :]
        id_map = open_maps(maps, None).map(side)
        found = stored(tmp_path / "model", side)
        assert torch.equal(torch.from_numpy(found), shared_rows(id_map, vectors, counts))
        weights = np.maximum(counts[:, 0], 0.1).astype(np.float64)
        for row in range(0, ROWS[side], 7):
            of_row = id_map.rows[:, 0].numpy() == row
            if of_row.any():
                mean = (weights[of_row, None] * vectors[of_row]).sum(0) / weights[of_row].sum()
                np.testing.assert_allclose(found[row], mean, atol=1e-5)


def test_a_map_that_renames_the_rows_changes_nothing(log, factors, tmp_path):
    renamed = {}
    for side in ROWS:
        made = random_map(log, side)
        order = torch.randperm(made.num_ids, generator=torch.Generator().manual_seed(1)).int()
        renamed[side] = replace(made, rows=order[:, None].contiguous(), num_rows=made.num_ids)
    hashed = write_maps(tmp_path / "maps", log, renamed)
    with_map = train(network(log, tmp_path / "with", factors, hashed))
    without = train(network(log, tmp_path / "without", factors))
    assert with_map.metrics == pytest.approx(without.metrics, abs=0.01)
    assert with_map.fit.losses == pytest.approx(without.fit.losses, rel=1e-4)


@pytest.mark.parametrize("strategy", ["random", "warm-start", "frozen", "frozen+residual"])
def test_a_model_evaluates_as_it_did_when_the_maps_are_gone(log, factors, two_way, strategy, tmp_path):
    hashed = shutil.copytree(two_way, tmp_path / "maps")
    start = None if strategy == "random" else factors
    result = train(network(log, tmp_path / "model", start, str(hashed), strategy))
    shutil.rmtree(hashed)
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model"))) == result.metrics
    broken = shutil.copytree(tmp_path / "model", tmp_path / "broken")
    (broken / "maps" / "user" / "rows.npy").unlink()
    with pytest.raises(InputError, match="maps/user: incomplete or corrupt id map"):
        evaluate(EvaluateConfig(data=log, model=str(broken)))
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["model"]["maps"] == ["user"]
    sizes = {
        "random": {"user": 60 * 64, "item": ITEMS * 64},
        "warm-start": {"user": 60 * 64, "item": ITEMS * 64},
        "frozen": {"user": 60 * 64, "item": ITEMS * 64},
        "frozen+residual": {"user": 60 * 64, "user_plus": 60 * 16, "item": ITEMS * 64, "item_plus": ITEMS * 16},
    }[strategy]
    if strategy != "random":
        sizes |= {"user_count": USERS, "item_count": ITEMS * 16}
    assert manifest["tables"] == sizes
    assert manifest["table_bytes"] == result.table_bytes == sum(sizes.values())
    # 60 rows are 6 bits, 2 of them an id and 2 float32 weights
    assert manifest["map_bytes"] == result.map_bytes == USERS * 2 * 6 // 8 + USERS * 2 * 4
    assert {file["name"] for file in manifest["hash"]["files"]} == {
        "user/map.json",
        "user/rows.npy",
        "user/weights.npy",
    }


@pytest.mark.parametrize(("storage", "width"), [("int8", DIM + 8), ("int4", DIM // 2 + 4)])
def test_shared_rows_in_fewer_bits(log, factors, maps, storage, width, tmp_path):
    result = train(network(log, tmp_path / "model", factors, maps, storage=storage))
    full = train(network(log, tmp_path / "full", factors, maps))
    assert abs(result.metrics["AUC"] - full.metrics["AUC"]) < 0.03
    assert evaluate(EvaluateConfig(data=log, model=str(tmp_path / "model"))) == result.metrics
    assert {side: stored(tmp_path / "model", side).nbytes for side in ROWS} == {
        side: rows * width for side, rows in ROWS.items()
    }
    assert result.table_bytes == sum(rows * width for rows in ROWS.values()) + USERS + ITEMS


def test_row_vectors_of_the_artifact_are_taken_as_they_are(log, factors, tmp_path):
    rng = np.random.default_rng(0)
    vectors = {side: rng.normal(size=(rows, DIM)).astype(np.float32) for side, rows in ROWS.items()}
    hashed = write_maps(tmp_path / "maps", log, {side: random_map(log, side) for side in ROWS}, vectors)
    train(network(log, tmp_path / "model", factors, hashed))
    for side, rows in vectors.items():
        np.testing.assert_array_equal(stored(tmp_path / "model", side), rows)


def _train_and_evaluate(log, factors, maps, out):
    metrics = train(network(log, out, factors, maps, "frozen+residual", "int4")).metrics
    return metrics, evaluate(EvaluateConfig(data=log, model=out))


def test_two_ranks_train_and_evaluate_as_one(log, factors, two_way, tmp_path):
    out = str(tmp_path / "model")
    of_ranks = run_on_ranks(_train_and_evaluate, 2, log, factors, two_way, out)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0][0] == of_ranks[0][1]
    # the checkpoint of two ranks, ranked by one: the same to the last bit
    assert evaluate(EvaluateConfig(data=log, model=out)) == of_ranks[0][0]
    users = stored(out, "user")
    train(network(log, tmp_path / "one", factors, two_way, "frozen+residual", "int4"))
    np.testing.assert_array_equal(users, stored(tmp_path / "one", "user"))


def _mapped_model():
    rng = np.random.default_rng(1)
    users, items = (
        replace(
            spec,
            map=IdMap(
                rows=torch.from_numpy(rng.integers(9, size=(spec.rows, rows_per_id)).astype(np.int32)), num_rows=9
            ),
            counted=True,
        )
        for spec, rows_per_id in zip(small.sides(), (1, 2), strict=True)
    )
    torch.manual_seed(7)
    model = TwoTower(small.config("frozen+residual"), users, items, tables_device="meta")
    dmp = shard(model, small.CPU, batch_size=small.ROWS, learning_rate=0.1)
    dmp.module.load_factors(*small.factors())
    dmp.module.load_counts(np.ones((small.USERS, 1), np.float32), np.ones((small.ITEMS, 1), np.float32))
    return dmp, TrainOptimizer(dmp, OptimizerConfig(learning_rate=0.01), 12)


def _pipelined():
    """Trained in the pipeline, with evaluations between, as without one."""
    dmp, optimizer = _mapped_model()
    pipelined = []

    def look():
        dmp.module.user_vectors(small.keyed("user", torch.arange(4)))
        names = {post.fqn.split(".")[-1] for post in run.pipeline._pipelined_postprocs}
        pipelined.append((names, len(run.pipeline._pipelined_modules)))
        return {"NDCG@10": float(len(pipelined))}

    config = FitConfig(epochs=2, evaluate_steps=3)
    run = TrainLoop(dmp, optimizer, config, small.CPU)
    run.evaluate_model = look
    run.run(small.batches)
    # frozen and trained tables of both sides
    assert pipelined == [({"user_rows", "item_rows"}, 4)] * 4
    plain, other = _mapped_model()
    plain.train()
    for epoch in range(2):
        for batch in small.batches(epoch):
            other.zero_grad()
            plain(batch)[0].backward()
            other.step()
    assert small.digest(dmp) == small.digest(plain)


def test_lookups_behind_a_map_are_pipelined_and_change_nothing():
    run_on_ranks(_pipelined, 1)


def plain_log(folder, users, items):
    folder.mkdir()
    rng = np.random.default_rng(0)
    columns = {"user_id": np.arange(1000) % users, "item_id": rng.integers(items, size=1000)}
    columns["item_id"][:items] = np.arange(items)
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return str(folder)


def test_maps_of_another_vocabulary_are_refused(log, factors, maps, tmp_path):
    other = plain_log(tmp_path / "sizes", 7, 9)
    with pytest.raises(InputError, match=r"made for 300 users .*, but .*sizes has 7"):
        train(network(other, tmp_path / "model", hashed=maps, strategy="random"))
    renamed = shutil.copytree(maps, tmp_path / "renamed")
    manifest = json.loads((renamed / "manifest.json").read_text())
    manifest["log"]["vocabularies"]["user"] = "another"
    (renamed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another user vocabulary"):
        train(network(log, tmp_path / "model", factors, str(renamed)))
    # the manifest is the log's, and a map in it is not
    odd = write_maps(tmp_path / "odd", log, {"item": replace(random_map(log, "item"), vocabulary="another")})
    with pytest.raises(InputError, match="another item vocabulary"):
        train(network(log, tmp_path / "model", factors, odd))
    assert not (tmp_path / "model").exists()


def test_maps_that_cannot_be_used_are_one_error(log, factors, tmp_path):
    one = random_map(log, "user")
    short = write_maps(tmp_path / "short", log, {"user": replace(one, rows=one.rows[:-1])})
    neither = write_maps(tmp_path / "neither", log, {"genre": one})
    empty = write_maps(tmp_path / "empty", log, {})
    wide = write_maps(tmp_path / "wide", log, {"user": one}, {"user": np.zeros((60, 8), np.float32)})
    few = write_maps(tmp_path / "few", log, {"user": one}, {"user": np.zeros((59, DIM), np.float32)})
    foreign = write_maps(tmp_path / "foreign", log, {"user": one}, {"user": np.zeros((60, DIM), np.float32)})
    manifest = json.loads((Path(foreign) / "manifest.json").read_text())
    manifest |= {"factors": "another", "config": {"factors": "elsewhere"}}
    (Path(foreign) / "manifest.json").write_text(json.dumps(manifest))
    damaged = write_maps(tmp_path / "damaged", log, {"user": one})
    (Path(damaged) / "user" / "rows.npy").write_bytes(b"no array")
    for hashed, message in (
        (short, "maps 299 users, but .* has 300"),
        (neither, "maps genre, expected a map of users or items"),
        (empty, "no map in it"),
        (wide, "dimension 8, expected that of .*, 16"),
        (few, r"\(59, 16\), expected float32 \(60, dimension\)"),
        (foreign, r"made from other factors \(elsewhere\) than .*recpress hash"),
        (damaged, "incomplete or corrupt id map"),
        (factors, "expected kind 'hash'"),
        (str(tmp_path / "nothing"), "no manifest.json"),
    ):
        with pytest.raises(InputError, match=message):
            train(network(log, tmp_path / "model", factors, hashed))
    assert not (tmp_path / "model").exists()
