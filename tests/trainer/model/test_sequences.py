"""A model with an EmbeddingCollection in `recpress train`: trained, hashed, frozen, sharded, saved, and bad input."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import Schema, StreamConfig
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig
from recpress.trainer.cli import main
from recpress.trainer.config import CommunicationConfig, OptimizerConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.train.config import TrainModelConfig
from recpress.trainer.train.model_stage import train_model
from tests.ranks import run_on_ranks

EXAMPLES = Path(__file__).parents[3] / "examples"
ITEMS, ROWS = 40, 4_000


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A click if the item has the parity of most of the last items."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    parity = rng.integers(0, 2, ROWS)
    history = [
        (2 * rng.integers(0, ITEMS // 2, n) + p).tolist() for n, p in zip(rng.integers(0, 7, ROWS), parity, strict=True)
    ]
    item = rng.integers(0, ITEMS, ROWS)
    click = rng.random(ROWS) < np.where(item % 2 == parity, 0.9, 0.1)
    columns = {
        "user_id": rng.integers(0, 30, ROWS),
        "item_id": item,
        "history": pa.array(history, pa.list_(pa.int64())),
        "click": click.astype(np.int8),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=1_000)
    return str(folder)


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    factorize(FactorizeConfig(data=log, out=out, als=ALSConfig(factors=8, sweeps=1)))
    return out


def config(log, out, item=None, **changes):
    sys.path.insert(0, str(EXAMPLES))
    from sequence_model import Config

    features = {
        "item_id": item or FeatureConfig(dimension=8),
        "history": FeatureConfig(kind="sequence", max_length=5, table="item_id"),
    }
    settings = {
        "features": features,
        "schema": Schema(label="click"),
        "stream": StreamConfig(batch_size=200),
        "optimizer": OptimizerConfig(learning_rate=0.01, table_learning_rate=0.2),
        "epochs": 6,
        "tensorboard": False,
        "model": Config(max_length=5),
    }
    return TrainModelConfig(data=log, out=str(out), factory="sequence_model:make", **{**settings, **changes})


def _train(log, out, item, changes):
    return train_model(config(log, out, item, **changes)).validation["AUC"]


CASES = {
    "row-wise on two ranks, fp16 between ranks": (
        2,
        FeatureConfig(dimension=8, sharding="row_wise"),
        {"communication": CommunicationConfig(forward="fp16", backward="fp16")},
    ),
    "two rows per id": (1, FeatureConfig(dimension=8, hash=FeatureHash(method="double", rows=30)), {}),
    "fp16 training": (1, None, {"precision": "fp16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_model_learns(log, case, tmp_path):
    world, item, changes = CASES[case]
    found = run_on_ranks(_train, world, log, str(tmp_path / "model"), item, changes, timeout=600)
    assert found[0] > 0.8, found
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["tables"]["item_id"] == (30 if item and item.hash else ITEMS) * 8 * 4
    assert len(list((tmp_path / "model").glob("weights/tables/*embeddings.item_id.weight"))) == 1


def test_frozen_rows_in_bytes_are_saved_and_evaluated(log, factors, tmp_path, capsys):
    """The rows say nothing about clicks here, so only what is stored is checked; `evaluate` reads it again."""
    item = FeatureConfig(frozen=factors, storage="int8")
    model = str(tmp_path / "model")
    run_on_ranks(_train, 2, log, model, item, {"epochs": 1}, timeout=600)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["tables"]["item_id"] == ITEMS * (8 + 8)
    assert len(list((tmp_path / "model").glob("weights/tables/*item_id.frozen/*.npy"))) >= 1


def test_a_warm_start_loads_the_rows_of_sequences(log, tmp_path):
    train_model(config(log, tmp_path / "first", epochs=1))
    still = OptimizerConfig(learning_rate=1e-30, table_learning_rate=1e-30)
    train_model(config(log, tmp_path / "second", epochs=1, optimizer=still, warm_start=str(tmp_path / "first")))
    (first,), (second,) = (
        list((tmp_path / name).glob("weights/tables/*embeddings.item_id.weight/*.npy")) for name in ("first", "second")
    )
    np.testing.assert_array_equal(np.load(first), np.load(second))


def test_what_does_not_know_sequences_names_them(log, tmp_path, capsys):
    model = str(tmp_path / "model")
    train_model(config(log, model, epochs=1))
    command = ["export", "--model", model, "--data", log, "--out", str(tmp_path / "out")]
    assert main([*command, "--factory", "sequence_model:make"]) == 2
    assert (
        "has an EmbeddingCollection, and recpress export knows EmbeddingBagCollections only" in capsys.readouterr().err
    )
    item = FeatureConfig(dimension=8, sharding="table_row_wise")
    with pytest.raises(
        InputError, match="table 'item_id' is in an EmbeddingCollection, which cannot be sharded table_row"
    ):
        train_model(config(log, tmp_path / "bad", item))


MODULE = """
from torch import nn

class Both(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.bags, self.sequences = inputs.embedding_bags("item_id"), inputs.sequences("history")

def both(config, inputs): return Both(inputs)
def unknown(config, inputs): return nn.ModuleList([inputs.sequences("shoe")])
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", "table 'item_id' is in an EmbeddingCollection and in another collection"),
        ("unknown", "no feature 'shoe' with a table; expected one of item_id, history"),
    ],
)
def test_bad_collections(log, name, message, tmp_path, monkeypatch):
    from recpress.trainer.model.factory import Empty

    (tmp_path / f"collections_{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = config(log, tmp_path / "model")
    with pytest.raises(InputError, match=message):
        train_model(TrainModelConfig(**{**vars(run), "factory": f"collections_{name}:{name}", "model": Empty()}))
