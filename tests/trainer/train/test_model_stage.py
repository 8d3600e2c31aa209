"""`recpress train --model`: a DLRM, DCN-v2 and a model of one's own, on one rank and on two, resumed, and bad input."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SampleConfig, Schema, StreamConfig, SynthCriteoConfig
from recpress.data.errors import InputError
from recpress.data.synthetic.criteo import synth_criteo
from recpress.modules.config import ALSConfig
from recpress.trainer.cli import main
from recpress.trainer.config import CheckpointConfig, OptimizerConfig
from recpress.trainer.errors import Preempted
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.model.config import DCNConfig, DLRMConfig
from recpress.trainer.train.config import HeldOutConfig, TrainModelConfig
from recpress.trainer.train.model_stage import train_model
from tests.ranks import run_on_ranks

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    config = SynthCriteoConfig(rows=12_000, test_rows=3_000, ids=2_000)
    return str(synth_criteo(config, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Users like items of their own parity; a history, a number and side tables; two row groups."""
    rng = np.random.default_rng(0)
    folder, rows = tmp_path_factory.mktemp("shop"), 6_000
    user, item = rng.integers(0, 60, rows), rng.integers(0, 40, rows)
    like = rng.random(rows) < np.where((user + item) % 2 == 0, 0.85, 0.15)
    history = [rng.integers(0, 40, n).tolist() for n in rng.integers(0, 5, rows)]
    table = pa.table(
        {
            "user_id": user,
            "item_id": item,
            "click": like.astype(np.int8),
            "stars": np.where(like, rng.integers(4, 6, rows), rng.integers(1, 4, rows)).astype(np.float32),
            "history": pa.array(history, pa.list_(pa.int64())),
            "price": pa.array(rng.lognormal(3, 1, rows), mask=rng.random(rows) < 0.1),
        }
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=3_000)
    pq.write_table(pa.table({"age": rng.integers(0, 7, 60), "income": rng.random(60)}), folder / "users.parquet")
    genres = pa.array([[k % 3, 3 + k % 2] for k in range(40)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"genres": genres}), folder / "items.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def factors(shop, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    factorize(FactorizeConfig(data=shop, out=out, als=ALSConfig(factors=8, sweeps=2)))
    return out


def config(data, out, factory="dlrm", model=None, **changes):
    options = {"dlrm": DLRMConfig, "dcn-v2": DCNConfig}
    settings = {"stream": StreamConfig(batch_size=500), "epochs": 2, "tensorboard": False}
    return TrainModelConfig(
        data=data, out=str(out), factory=factory, model=model or options[factory](), **{**settings, **changes}
    )


def of_shop(shop, out, **changes):
    return config(shop, out, **{"schema": Schema(label="click", floats=("price",)), **changes})


def weights(folder):
    files = sorted(path.relative_to(folder) for path in (Path(folder) / "weights").rglob("*") if path.is_file())
    return {str(path): (Path(folder) / path).read_bytes() for path in files}


@pytest.mark.parametrize("factory", ["dlrm", "dcn-v2"])
def test_a_model_learns_and_its_manifest_says_what_it_is(criteo, factory, tmp_path):
    result = train_model(config(criteo, tmp_path / "model", factory))
    assert result.metrics["AUC"] > 0.7
    assert result.metrics["NE"] < 0.95
    assert result.metrics["rows"] == 3_000
    assert 0.8 < result.metrics["Calibration"] < 1.2
    assert result.rows == pytest.approx(12_000 * 5 / 6, rel=0.02)  # 2,000 validation rows are held out
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["model"]["name"] == factory
    assert set(manifest["tables"]) == {f"C{k}" for k in range(1, 27)}
    assert result.table_bytes == sum(manifest["tables"].values()) == 2_000 * 16 * 4


def test_patience_stops_the_run_and_the_best_weights_are_published(criteo, tmp_path):
    evaluation = HeldOutConfig(patience=1)
    result = train_model(config(criteo, tmp_path / "model", epochs=40, evaluation=evaluation))
    losses = [found["LogLoss"] for found in result.fit.evaluations]
    assert len(losses) < 40
    assert result.validation["LogLoss"] == min(losses) < losses[-1]


def _run(data, out, factors):
    """Of a Criteo log in fp16; or of the shop with frozen and hashed tables, in steps of two batches in bf16."""
    if factors is None:
        return config(data, out, epochs=3, precision="fp16", ema=0.9)
    features = {
        "user_id": FeatureConfig(frozen=factors, hash=FeatureHash(rows=30), sharding="row_wise"),
        "item_id": FeatureConfig(hash=FeatureHash(method="double", rows=20), learning_rate=0.02),
        "history": FeatureConfig(kind="sequence", max_length=3, pooling="mean"),
        "price": FeatureConfig(),
    }
    settings = {"checkpoint": CheckpointConfig(steps=2), "accumulate": 2, "precision": "bf16", "ema": 0.9}
    settings["optimizer"] = OptimizerConfig(tables="adagrad", schedule="linear")
    return of_shop(data, out, features=features, epochs=3, **settings)


def _trained(data, out, factors=None):
    return train_model(_run(data, out, factors)).validation


def _interrupted(data, out, factors):
    """The error of a run that a signal stops after some steps, and the result of the same command."""
    found = []
    call = FeatureBatches.__call__

    def stopping(self, rows):
        if rows.epoch == 1 and rows.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, rows)

    FeatureBatches.__call__ = stopping
    try:
        train_model(_run(data, out, factors))
    except Preempted as error:
        found.append(str(error))
    finally:
        FeatureBatches.__call__ = call
    return [*found, _trained(data, out, factors)]


@pytest.mark.parametrize(("world", "kind"), [(1, "criteo"), (2, "shop")])
def test_a_resumed_run_ends_with_the_same_bits(criteo, shop, factors, world, kind, tmp_path):
    data, factors = (criteo, None) if kind == "criteo" else (shop, factors)
    whole = run_on_ranks(_trained, world, data, str(tmp_path / "whole"), factors, timeout=600)
    stopped = run_on_ranks(_interrupted, world, data, str(tmp_path / "stopped"), factors, timeout=600)
    assert "stopped by" in stopped[0][0]
    assert stopped[0][1] == whole[0]
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")


def test_all_kinds_of_features(shop, factors, tmp_path):
    features = {
        "user": FeatureConfig(column="user_id", frozen=factors, storage="fp16", sharding="row_wise"),
        "who": FeatureConfig(column="user_id"),
        "item": FeatureConfig(column="item_id", dimension=16),
        "seen": FeatureConfig(column="history", kind="sequence", max_length=2, table="item", pooling="mean"),
        "genres": FeatureConfig(hash=FeatureHash(method="double", rows=3)),
        "age": FeatureConfig(sharding="table_wise", dimension=4),
        "price_bucket": FeatureConfig(column="price", kind="bucketized", buckets=5),
        "price": FeatureConfig(),
        "income": FeatureConfig(transform=("standardize",)),
    }
    fast = OptimizerConfig(learning_rate=0.02, table_learning_rate=0.2)
    result = train_model(of_shop(shop, tmp_path / "model", features=features, epochs=15, optimizer=fast))
    assert result.validation["AUC"] > 0.7
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["tables"]["user"] == 60 * 8 * 2  # float16
    assert manifest["tables"]["genres"] == 3 * 8 * 4
    assert manifest["tables"]["price_bucket"] == 6 * 8 * 4  # and one for missing numbers
    saved = np.concatenate([np.load(p) for p in (tmp_path / "model/weights/tables").glob("*user.frozen/*.npy")])
    assert saved.shape == (60, 8)


def test_without_a_configuration_all_columns_are_features(shop, tmp_path, capsys):
    result = train_model(of_shop(shop, tmp_path / "model", epochs=1))
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert set(manifest["model"]["features"]) == {"user_id", "item_id", "price", "age", "income", "genres"}
    assert result.validation
    assert main(["recommend", "--data", shop, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "best")]) == 2
    assert "a model of --model dlrm, which does not rank" in capsys.readouterr().err


def test_ratings_become_labels_at_the_threshold(shop, tmp_path):
    by_click = train_model(of_shop(shop, tmp_path / "click"))
    stars = Schema(label="stars", floats=("price",))
    by_stars = train_model(of_shop(shop, tmp_path / "stars", schema=stars, label_threshold=4.0))
    assert by_click.validation == by_stars.validation


def _own(criteo, out):
    from recpress.trainer.model.factory import config_of

    return train_model(config(criteo, out, "own_model:make", config_of("own_model:make")(hidden=(16,)))).metrics


def test_the_example_trains_on_two_ranks_and_from_the_command_line(criteo, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) <= 60
    metrics = run_on_ranks(_own, 2, criteo, str(tmp_path / "two"), timeout=600)
    assert metrics[0] == metrics[1]
    assert metrics[0]["AUC"] > 0.6
    command = ["train", "--model", "own_model:make", "--data", criteo, "--out", str(tmp_path / "one")]
    assert main([*command, "--model.hidden", "16", "--epochs", "1", "--no-tensorboard"]) == 0
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["model"]["options"]["hidden"] == [16]


BAD = {
    "missing column": ({"x": FeatureConfig(column="shoe")}, {}, "features.x: .* no column 'shoe'"),
    "the label": ({"click": FeatureConfig()}, {}, "the label is no feature"),
    "kind": ({"history": FeatureConfig(kind="id")}, {}, "features.history.kind is 'id'.*lists of ids"),
    "no table": ({"price": FeatureConfig()}, {}, "no feature with an embedding table"),
    "dimensions": (
        {"item_id": FeatureConfig(dimension=8), "history": FeatureConfig(table="item_id", dimension=16)},
        {},
        "table 'item_id': .*another dimension .item_id: 8, history: 16",
    ),
    "too few rows": ({"item_id": FeatureConfig(num_ids=39)}, {}, "table 'item_id': num_ids is 39, but the log has 40"),
    "hash rows": (
        {"item_id": FeatureConfig(hash=FeatureHash(rows=41))},
        {},
        "table 'item_id': hash.rows is 41, but the table has 40 ids",
    ),
    "layout": (
        {"user_id": FeatureConfig(frozen="f", storage="int8", sharding="column_wise")},
        {},
        "features.user_id.sharding: rows of int8 .* cannot be sharded by column",
    ),
    "labels": ({}, {"schema": Schema(label="stars")}, "'stars'.*expected .*0.*1"),
    "one label": (
        {},
        {"schema": Schema(label="stars"), "label_threshold": 0.5},
        "'stars': the label of each row is 1, expected 0 and 1; --label-threshold 0.5 is out of range",
    ),
    "no label": ({}, {"schema": Schema()}, "no label; expected --schema.label"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_and_labels(shop, case, tmp_path):
    features, changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        train_model(of_shop(shop, tmp_path / "model", features=features, **changes))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_kind(label, tmp_path):
    (tmp_path / "log").mkdir()
    rows = {"user_id": range(9), "item_id": range(9), "click": [label] * 9}
    pq.write_table(pa.table({name: list(values) for name, values in rows.items()}), tmp_path / "log" / "train.parquet")
    message = f"'click': the label of each row is {label}, expected 0 and 1; --label-threshold makes"
    with pytest.raises(InputError, match=message):
        train_model(config(str(tmp_path / "log"), tmp_path / "model", schema=Schema(label="click")))


def test_a_threshold_is_a_number(shop, tmp_path):
    with pytest.raises(InputError, match="label_threshold is nan, expected a finite number"):
        of_shop(shop, tmp_path / "model", label_threshold=float("nan"))


def _errors(shop, out):
    found = []
    for features, changes, _ in BAD.values():
        try:
            train_model(of_shop(shop, out, features=features, **changes))
        except InputError as error:
            found.append(str(error))
    return found


def test_bad_input_is_the_same_line_on_every_rank(shop, tmp_path):
    first, second = run_on_ranks(_errors, 2, shop, str(tmp_path / "model"), timeout=600)
    assert first == second
    assert len(first) == len(BAD)
    assert not any("\n" in line for line in first)


MODULE = """
from dataclasses import dataclass
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

@dataclass
class Needs:
    width: int

def needs(config: Needs, inputs): ...
def one_argument(config): ...
def text(config: str, inputs): ...
def nothing(config, inputs): return 3
def no_tables(config, inputs): return nn.Linear(1, 1)
number = 4

def _bags(name, features, rows):
    table = EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=4, feature_names=features)
    return EmbeddingBagCollection([table], device=torch.device("meta"))

def unknown_feature(config, inputs): return nn.ModuleList([_bags("t", ["shoe"], 4)])
def few_rows(config, inputs): return nn.ModuleList([_bags("t", ["item_id"], 4)])

class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags = _bags("t", ["item_id"], 40)
    def forward(self, batch):
        return self.bags(batch.sparse_features).values().sum()

def wrong_result(config, inputs): return Wrong()

class Shape(Wrong):
    def forward(self, batch):
        values = self.bags(batch.sparse_features).values()
        return values.sum(), values

def wrong_shape(config, inputs): return Shape()

class Logits(Wrong):
    def forward(self, batch):
        logits = self.bags(batch.sparse_features).values().sum(1) - 1
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits

def logits(config, inputs): return Logits()

class Constant(Wrong):
    def forward(self, batch):
        return torch.zeros(()), self.bags(batch.sparse_features).values().sum(1).sigmoid()

def constant_loss(config, inputs): return Constant()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dlmr", "nearest is 'dlrm'"),
        ("nowhere.at_all:make", "nowhere.at_all:make: cannot be imported .ModuleNotFoundError"),
        ("broken_models:make", "cannot be imported .SyntaxError"),
        ("bad_models:missing", "no attribute 'missing'"),
        ("bad_models:number", "is a int, expected a function"),
        ("bad_models:one_argument", "takes 1 arguments, expected make.config, inputs."),
        ("bad_models:text", "expected a dataclass of options"),
        ("bad_models:needs", "an option without a default"),
        ("bad_models:nothing", "returned int, expected an nn.Module"),
        ("bad_models:no_tables", "expected at least one table"),
        ("bad_models:unknown_feature", "table 't' takes the feature 'shoe'"),
        ("bad_models:few_rows", "table 't' has 4 rows, but the feature 'item_id' has 40 ids"),
        ("bad_models:wrong_result", "expected .loss, predictions."),
        ("bad_models:wrong_shape", "its predictions are .500, 4., expected a tensor .500,."),
        ("bad_models:logits", r"its predictions are in .-.*, .*, expected probabilities in .0, 1."),
        ("bad_models:constant_loss", "its loss has no gradient"),
    ],
)
def test_bad_factories_are_one_line(shop, name, message, tmp_path, monkeypatch, capsys):
    import re

    (tmp_path / "bad_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("def make(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["train", "--model", name, "--data", shop, "--out", str(tmp_path / "model"), "--schema.label", "click"]
    assert main([*command, "--stream.batch-size", "500", "--no-tensorboard"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


def test_a_configuration_file_has_features_and_names_no_module(shop, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        'epochs = 1\ntensorboard = false\n[schema]\nlabel = "click"\n[model]\nname = "dcn-v2"\ncross_layers = 2\n'
        "[features.item_id]\ndimension = 8\nhash = {rows = 10}\n[features.user_id]\ndimension = 8\n"
    )
    command = ["train", "--data", shop, "--out", str(tmp_path / "model"), "--config", str(tmp_path / "run.toml")]
    assert main(command) == 0
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["model"]["name"] == "dcn-v2"
    assert manifest["tables"] == {"item_id": 10 * 8 * 4, "user_id": 60 * 8 * 4}

    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef make(config, inputs): ...\n")
    for text in ('model = "evil:make"', '[model]\nname = "evil:make"'):
        (tmp_path / "run.toml").write_text(text)
        assert main(command) == 2
        assert "--model evil:make" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[features.item_id]\ndimensions = 8",
            "'features.item_id.dimensions', nearest is 'features.item_id.dimension'",
        ),
        ('[features.item_id]\ndimension = "8"', "'features.item_id.dimension' is '8', expected int"),
        ("[features.item_id]\nhash = {method = 'modulo'}", "'features.item_id.hash' has no 'rows'"),
        ("features = 3", "expected tables .features.NAME."),
        ("[features.item_id]\nmax_length = 3", "features.item_id.max_length: expected kind"),
        ("[features.item_id]\nlearning_rate = -1.0", "features.item_id.learning_rate is -1.0, expected at least 0"),
        ("[features.price]\nkind = 'float'\nlearning_rate = 0.0", "features.price.learning_rate: a float has no table"),
    ],
)
def test_bad_keys_of_features(shop, text, message, tmp_path, capsys):
    import re

    (tmp_path / "run.toml").write_text(f'model = "dlrm"\n{text}' if "=" in text.split("\n")[0] else f"{text}")
    command = ["train", "--model", "dlrm", "--data", shop, "--out", str(tmp_path / "model"), "--schema.label", "click"]
    assert main([*command, "--config", str(tmp_path / "run.toml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_another_map_or_feature_needs_a_new_run(criteo, tmp_path):
    """A checkpoint is not resumed with other features."""

    def stopping(self, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, rows)

    call = FeatureBatches.__call__
    run = config(criteo, tmp_path / "model")
    FeatureBatches.__call__ = stopping
    try:
        with pytest.raises(Preempted):
            train_model(run)
    finally:
        FeatureBatches.__call__ = call
    with pytest.raises(InputError, match=r"written with other settings .*dimension"):
        train_model(replace(run, features={"C1": FeatureConfig(dimension=8)}))
    with pytest.raises(InputError, match=r"sample\.rate"):
        train_model(replace(run, sample=SampleConfig(rate=0.5)))


def test_movielens_is_a_click_log_with_features(tmp_path):
    rng = np.random.default_rng(0)
    raw = tmp_path / "raw"
    raw.mkdir()
    users, items = range(1, 31), range(1, 21)
    ratings = [
        f"{u}::{i}::{rng.integers(4, 6) if (u + i) % 2 else rng.integers(1, 4)}::{u + i}" for u in users for i in items
    ]
    (raw / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (raw / "users.dat").write_text("".join(f"{u}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{u % 5}::0\n" for u in users))
    (raw / "movies.dat").write_text("".join(f"{i}::Film {i} ({1990 + i})::Comedy|Drama\n" for i in items))
    log = str(tmp_path / "log")
    assert main(["ingest", "--input", str(raw), "--out", log]) == 0
    fast = OptimizerConfig(learning_rate=0.02, table_learning_rate=0.2)
    run = config(
        log, tmp_path / "model", label_threshold=4.0, epochs=20, optimizer=fast, stream=StreamConfig(batch_size=50)
    )
    result = train_model(run)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert set(manifest["model"]["features"]) == {"user_id", "item_id", "gender", "age", "occupation", "genres", "year"}
    assert result.validation["AUC"] > 0.7
