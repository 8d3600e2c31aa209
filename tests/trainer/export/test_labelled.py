"""`recpress export` of models of labels: a DLRM, a DCN-v2 and a model of one's own give the trainer's predictions."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import Schema, StreamConfig
from recpress.data.dataset.parquet_split import iter_row_groups
from recpress.trainer.cli import main
from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.loader import _checked, load
from recpress.trainer.export.stage import export
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.model.config import DCNConfig, DLRMConfig
from recpress.trainer.model.factory import config_of
from recpress.trainer.train import model_stage
from recpress.trainer.train.config import TrainModelConfig
from recpress.trainer.train.model_stage import train_model
from tests.trainer.export.models import write_factors

pytestmark = pytest.mark.slow
USERS, ITEMS, ROWS = 60, 40, 3_000


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A history, a number and side tables with a category, a number and a list."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shop")
    user, item = rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)
    like = rng.random(ROWS) < np.where((user + item) % 2 == 0, 0.85, 0.15)
    history = [rng.integers(0, ITEMS, n).tolist() for n in rng.integers(0, 6, ROWS)]
    columns = {
        "user_id": user,
        "item_id": item,
        "click": like.astype(np.int8),
        "history": pa.array(history, pa.list_(pa.int64())),
        "price": pa.array(rng.lognormal(3, 1, ROWS).astype(np.float32), mask=rng.random(ROWS) < 0.1),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet")
    pq.write_table(pa.table({"age": rng.integers(0, 7, USERS), "income": rng.random(USERS)}), folder / "users.parquet")
    genres = pa.array([list(range(k % 4)) for k in range(ITEMS)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"genres": genres}), folder / "items.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def factors(shop, tmp_path_factory):
    return write_factors(shop, tmp_path_factory.mktemp("factors") / "factors")


def config(shop, out, factory, model, features):
    return TrainModelConfig(
        data=shop,
        out=str(out),
        factory=factory,
        model=model,
        features=features,
        schema=Schema(label="click", floats=("price",)),
        stream=StreamConfig(batch_size=500),
        epochs=1,
        tensorboard=False,
    )


def every_kind(factors):
    """One feature of each kind; a frozen, a hashed and a shared table."""
    return {
        "user_id": FeatureConfig(frozen=factors, hash=FeatureHash(rows=30), storage="fp16"),
        "item_id": FeatureConfig(hash=FeatureHash(method="double", rows=20), pooling="mean", dimension=12),
        "history": FeatureConfig(kind="sequence", max_length=3, table="item_id"),
        "age": FeatureConfig(),
        "income": FeatureConfig(kind="bucketized", buckets=8),
        "genres": FeatureConfig(pooling="mean", dimension=8),
        "price": FeatureConfig(),
        "price_bucket": FeatureConfig(column="price", kind="bucketized", buckets=8),
    }


def trained(config, monkeypatch):
    """Train, and return the probabilities of the trained model for all rows of train."""
    found = []
    test = model_stage._test

    def predict(config, inputs, model, ranks):
        builder = model_stage.FeatureBatches(inputs.features, inputs.log, inputs.label)
        chunks = [rows for _, rows in iter_row_groups(inputs.log.train, inputs.columns)]
        from recpress.trainer.evaluate.labelled import _batches

        for batch, count in _batches(chunks, builder, 500):
            with torch.no_grad():
                found.append(model.dmp(batch.to(ranks.device))[1][:count])
        return test(config, inputs, model, ranks)

    monkeypatch.setattr(model_stage, "_test", predict)
    train_model(config)
    return torch.cat(found)


def log_columns(shop):
    """All rows of train, as a client passes them."""
    table = pq.read_table(Path(shop) / "train.parquet")
    history = table["history"].combine_chunks()
    return {
        "user_id": torch.from_numpy(table["user_id"].to_numpy()),
        "item_id": torch.from_numpy(table["item_id"].to_numpy()),
        "history.values": torch.from_numpy(history.flatten().to_numpy().copy()),
        "history.lengths": torch.from_numpy(history.value_lengths().to_numpy().astype(np.int64)),
        "price": torch.from_numpy(table["price"].to_numpy().astype(np.float32)),
    }


@pytest.mark.parametrize(
    ("factory", "model"),
    [("dlrm", DLRMConfig()), ("dcn-v2", DCNConfig()), ("examples.own_model:make", None)],
)
def test_programs_give_the_predictions_of_the_trainer(shop, factors, factory, model, tmp_path, monkeypatch, capfd):
    model = model or config_of(factory)()
    own = ":" in factory
    features = every_kind(factors)
    if own:  # its first-order tables and vectors of one dimension
        features = {
            name: FeatureConfig(kind=f.kind, column=f.column, max_length=f.max_length, buckets=f.buckets)
            for name, f in features.items()
        }
    expected = trained(config(shop, tmp_path / "model", factory, model, features), monkeypatch)
    out = str(tmp_path / "fp32")
    if own:
        assert main(["export", "--model", str(tmp_path / "model"), "--out", out]) == 2
        assert f"pass --factory {factory}" in capfd.readouterr().err
    for storage, tolerance in (("fp32", 1e-5), ("int8", 1e-2))[: 1 + (factory == "dlrm")]:
        out, aot = str(tmp_path / storage), storage == "int8" and shutil.which("g++") is not None
        settings = {"storage": storage, "aot": aot, "factory": factory if own else ""}
        export(ExportConfig(model=str(tmp_path / "model"), out=out, **settings))
        spec = json.loads((Path(out) / "manifest.json").read_text())["programs"]["model"]
        given = log_columns(shop)
        for compiled in (False, True)[: 1 + aot]:
            found = load(out, "model", aot=compiled)({part["name"]: given[part["name"]] for part in spec["inputs"]})
            assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_frozen_rows_that_are_stored_with_padding(shop, storage, tmp_path, monkeypatch):
    factors = write_factors(shop, tmp_path / "factors", dim=10)  # stored as 12
    features = {name: FeatureConfig(frozen=factors, storage=storage) for name in ("user_id", "item_id")}
    features["price"] = FeatureConfig()
    expected = trained(config(shop, tmp_path / "model", "dlrm", DLRMConfig(), features), monkeypatch)
    export(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "export"), storage=storage))
    spec = json.loads((tmp_path / "export/manifest.json").read_text())["programs"]["model"]
    given = log_columns(shop)
    found = load(str(tmp_path / "export"), "model")({part["name"]: given[part["name"]] for part in spec["inputs"]})
    assert float((found - expected).abs().max()) < (1e-5 if storage == "fp32" else 1e-2)


def test_an_export_ships_the_hash_of_raw_ids(shop, tmp_path, monkeypatch):
    table = pq.read_table(Path(shop) / "train.parquet")
    texts = pa.array([f"item-{number}" for number in range(ITEMS)])
    history = pa.ListArray.from_arrays(
        table["history"].combine_chunks().offsets, texts.take(table["history"].combine_chunks().flatten())
    )
    columns = {"user_id": pc.multiply(table["user_id"], -(10**15)), "item_id": texts.take(table["item_id"])}
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table({**columns, "history": history, "click": table["click"]}), tmp_path / "log/train.parquet")
    hashed = ("user_id=500", "item_id=300", "history=300")
    features = {"history": FeatureConfig(kind="list", table="item_id"), "item_id": FeatureConfig()}
    run = config(str(tmp_path / "log"), tmp_path / "model", "dlrm", DLRMConfig(), features)
    expected = trained(replace(run, schema=Schema(label="click", hashed=hashed)), monkeypatch)
    out = tmp_path / "export"
    export(ExportConfig(model=str(tmp_path / "model"), out=str(out), storage="fp32"))
    spec = importlib.util.spec_from_file_location("shipped", out / "hash_ids.py")
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    raw = {
        "user_id": columns["user_id"].to_numpy(),
        "item_id": columns["item_id"].to_pylist(),
        "history": history.flatten().to_pylist(),
    }
    given = {name: torch.from_numpy(shipped.hash_of(out, name)(values)) for name, values in raw.items()}
    given["history.values"] = given.pop("history")
    given["history.lengths"] = torch.from_numpy(history.value_lengths().to_numpy().astype(np.int64))
    inputs = [part["name"] for part in json.loads((out / "manifest.json").read_text())["programs"]["model"]["inputs"]]
    found = load(out, "model")({name: given[name] for name in inputs})
    assert float((found - expected).abs().max()) < 1e-5
    for values, message in ((["7"], "text, but the log has integers"), ([1.5], "1.5 .float.; expected an integer")):
        with pytest.raises(ValueError, match=message):
            shipped.hash_of(out, "user_id")(values)
    with pytest.raises(ValueError, match="'click' is not hashed; hashed are: user_id, item_id, history"):
        shipped.hash_of(out, "click")


def test_a_program_gives_nan_for_lengths_that_do_not_fit(shop, tmp_path):
    """The program itself: C++ and Triton call it without load.py."""
    features = {"history": FeatureConfig(kind="sequence", max_length=3), "user_id": FeatureConfig()}
    train_model(config(shop, tmp_path / "model", "dlrm", DLRMConfig(), features))
    export(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "export")))
    spec = json.loads((tmp_path / "export/manifest.json").read_text())["programs"]["model"]
    program = torch.export.load(tmp_path / "export/model.pt2").module()
    given = {part["name"]: torch.tensor([0, 1]) for part in spec["inputs"]}
    given |= {"history.values": torch.tensor([4, 5, 6]), "price": torch.ones(2)}
    for lengths, fits in (([1, 2], True), ([0, 3], True), ([4, -1], False), ([1, 1], False), ([9, 9], False)):
        given["history.lengths"] = torch.tensor(lengths)
        found = program(*(given[part["name"]] for part in spec["inputs"]))
        assert torch.isnan(found).tolist() == [not fits] * 2, lengths


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 1], "adds up to 2, but there are 3 values"),
        ([3], "has 1 rows, other inputs 2"),
        ([4, -1], "has a negative length"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lengths, message):
    spec = {
        "inputs": [
            {"name": "user_id", "dtype": "int64", "shape": ["batch"]},
            {"name": "history.values", "dtype": "int64", "shape": ["history"]},
            {"name": "history.lengths", "dtype": "int64", "shape": ["batch"], "values": "history"},
        ],
        "max": {"batch": 8, "history": 8},
    }
    with pytest.raises(ValueError, match=message):
        _checked("model", spec, [torch.tensor([0, 1]), torch.tensor([4, 5, 6]), torch.tensor(lengths)])


def test_a_model_of_labels_has_no_index(shop, tmp_path, capfd):
    train_model(config(shop, tmp_path / "model", "dlrm", DLRMConfig(), {}))
    arguments = ["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--index", "faiss"]) == 2
    assert "has no item vectors" in capfd.readouterr().err
