"""Small logs and models for the tests of exports."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import describe_log
from recpress.trainer.artifacts.id_maps import HASH, save_maps
from recpress.trainer.cli import main
from recpress.trainer.config import EvaluationConfig, TrainConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.model.two_tower import load_model

USERS, ITEMS, DIM = 150, 120, 12


def write_log(folder: Path) -> str:
    """An ingested log: raw ids `u<k>` and numbers, with features of users and items."""
    rng = np.random.default_rng(0)
    with open(folder / "log.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id"])
        for user in range(USERS):
            rows.writerows([f"u{user}", 7 * item] for item in rng.choice(ITEMS, 30, replace=False))
        rows.writerows([["u0", 7 * item] for item in range(ITEMS)])
    out = folder / "log"
    assert main(["ingest", "--input", str(folder / "log.csv"), "--out", str(out)]) == 0
    cities = pa.array(rng.integers(0, 6, USERS))
    pq.write_table(pa.table({"city": cities, "age": rng.random(USERS)}), out / "users.parquet")
    tags = pa.array([rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(ITEMS)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"tags": tags}), out / "items.parquet")
    return str(out)


def write_factors(log: str, out: Path, dim: int = DIM) -> str:
    factorize(FactorizeConfig(data=log, out=str(out), als=ALSConfig(factors=dim, sweeps=3)))
    return str(out)


def write_maps(log: str, out: Path, maps: dict[str, IdMap]) -> str:
    """What `recpress hash` writes."""
    with artifact.writing(out, HASH, {"log": describe_log(open_log(log))}) as tmp:
        save_maps(maps, tmp)
    return str(out)


def random_map(ids: int, rows: int, rows_per_id: int = 1, weighted: bool = False) -> IdMap:
    rng = np.random.default_rng(rows)
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (ids, rows_per_id)).astype(np.float16)) if weighted else None
    found = torch.from_numpy(rng.integers(rows, size=(ids, rows_per_id)).astype(np.int32))
    return IdMap(rows=found, num_rows=rows, weights=weights, method="random", seed=5)


def two_tower(log: str, out: Path, factors: str | None, strategy: str, **changes) -> TrainConfig:
    """A run of one epoch without validation, so that the network itself is published."""
    kind, storage = changes.pop("kind", "residual" if factors else "mlp"), changes.pop("storage", "fp32")
    settings = {
        "stream": StreamConfig(batch_size=256),
        "negatives": NegativesConfig(count=16, shared=True),
        "model": TwoTowerConfig(
            tables=TablesConfig(strategy=strategy, dim=DIM, residual_dim=4, storage=storage),
            towers=TowersConfig(kind=kind, hidden=(16,), dim=DIM),
            loss=LossConfig(kind="softmax"),
        ),
        "sample": SampleConfig(rate=0.5, seed=3),
        "epochs": 1,
        "tensorboard": False,
        "evaluation": EvaluationConfig(every=0),
    }
    return TrainConfig(data=log, out=str(out), factors=factors, **{**settings, **changes})


def trainer_vectors(model: str, log: str) -> dict[str, torch.Tensor]:
    """The vectors of all users and items by the trainer's own model."""

    def vectors() -> dict[str, torch.Tensor]:
        with process_group("cpu") as ranks:
            opened = open_log(log)
            loaded = load_model(model, opened, ranks)
            sides = ("user", "item")
            return {side: loaded.vectors(side)(torch.arange(opened.num_ids(side))).clone() for side in sides}

    return vectors()
