"""A small click log with every kind of feature, and models of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import Schema, StreamConfig
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.model.config import DCNConfig, DLRMConfig
from recpress.trainer.train.config import TrainModelConfig

USERS, ITEMS = 60, 40
SCHEMA = Schema(label="click", floats=("price",))
ROWS = {"train": 4_000, "val": 700, "test": 900}


def write_click_log(folder: Path, parts: tuple[str, ...] = ("train", "val", "test")) -> str:
    """Users like items of their own parity; a history, a number, and side tables."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in ROWS.items():
        user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
        if part == "train":
            user[:USERS], item[:ITEMS] = range(USERS), range(ITEMS)
        like = rng.random(rows) < np.where((user + item) % 2 == 0, 0.85, 0.15)
        history = [rng.integers(0, ITEMS, n).tolist() for n in rng.integers(0, 5, rows)]
        columns = {
            "user_id": user,
            "item_id": item,
            "click": like.astype(np.int8),
            "history": pa.array(history, pa.list_(pa.int64())),
            "price": pa.array(rng.lognormal(3, 1, rows), mask=rng.random(rows) < 0.1),
        }
        if part in parts:
            pq.write_table(pa.table(columns), folder / f"{part}.parquet", row_group_size=rows // 2)
    pq.write_table(pa.table({"age": rng.integers(0, 7, USERS), "income": rng.random(USERS)}), folder / "users.parquet")
    genres = pa.array([[k % 3, 3 + k % 2] for k in range(ITEMS)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"genres": genres}), folder / "items.parquet")
    return str(folder)


def features(factors: str) -> dict[str, FeatureConfig]:
    """A frozen table in 8 bits behind a map, hashed and shared tables, a sequence, numbers and side tables."""
    return {
        "user_id": FeatureConfig(frozen=factors, storage="int8", hash=FeatureHash(rows=30)),
        "item_id": FeatureConfig(hash=FeatureHash(method="double", rows=20)),
        "history": FeatureConfig(kind="sequence", max_length=3, table="item_id"),
        "genres": FeatureConfig(pooling="mean", dimension=4),
        "age": FeatureConfig(),
        "price": FeatureConfig(),
        "income": FeatureConfig(kind="bucketized", buckets=5),
    }


def click_config(data: str, out: object, factory: str = "dlrm", **changes: object) -> TrainModelConfig:
    options = {"dlrm": DLRMConfig, "dcn-v2": DCNConfig}
    settings = {"schema": SCHEMA, "stream": StreamConfig(batch_size=400), "epochs": 2, "tensorboard": False}
    if factory in options:
        settings["model"] = options[factory]()
    return TrainModelConfig(data=data, out=str(out), factory=factory, **{**settings, **changes})  # type: ignore[arg-type]
