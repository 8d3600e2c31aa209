"""How much memory does `recpress export` take for a model whose tables are shards of two ranks?

Takes 30 s small, 5 minutes full, alone on two cores.

    python benchmarks/export_memory.py --rows 10000000 --dim 64 --out runs/export-memory.json
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, open_log
from recpress.modules.config import TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.artifacts.factors import MODEL, describe_log
from recpress.trainer.model.two_tower import WEIGHTS, describe_model

SMALL = ("--rows", "200000", "--dim", "16")
FULL = ("--rows", "10000000")

RANKS, ITEMS = 2, 10_000
RUN = """
import re, sys
from recpress.trainer.cli import main
assert main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
"""Runs a command and prints the peak of its memory in KiB. (`ru_maxrss` would start at the memory of this process.)"""


def write_model(folder: Path, rows: int, dim: int) -> str:
    """A log, and a model of `rows` users with the shards that `RANKS` ranks write."""
    data = folder / "log"
    data.mkdir()
    users = np.arange(rows)
    pq.write_table(pa.table({"user_id": users, "item_id": users % ITEMS}), data / "train.parquet")
    log = open_log(data)
    config = TwoTowerConfig(
        tables=TablesConfig(strategy="random", dim=dim), towers=TowersConfig(kind="mlp", hidden=(128,), dim=dim)
    )
    user, item = (SideSpec(key=side, rows=log.num_ids(side)) for side in SIDES)
    dense = {
        name: tensor
        for name, tensor in TwoTower(config, user, item, tables_device="meta").state_dict().items()
        if ".embedding_bags." not in name
    }
    manifest = {"log": describe_log(log), "config": {}, "model": describe_model(config, None, (), ())}
    rng = np.random.default_rng(0)
    with artifact.writing(folder / "model", MODEL, manifest) as tmp:
        (tmp / WEIGHTS).mkdir()
        torch.save(dense, tmp / WEIGHTS / "dense.pt")
        for side, count in (("user", rows), ("item", ITEMS)):
            table = tmp / WEIGHTS / "tables" / f"{side}_tables.embedding_bags.{side}.weight"
            table.mkdir(parents=True)
            bounds = np.linspace(0, count, RANKS + 1).astype(int)
            for first, last in itertools.pairwise(bounds.tolist()):
                name = table / f"rows-{first}-{last}-columns-0-{dim}.npy"
                part = np.lib.format.open_memmap(name, "w+", np.float32, (last - first, dim))
                for start in range(0, last - first, 1 << 16):
                    part[start : start + (1 << 16)] = rng.standard_normal(
                        part[start : start + (1 << 16)].shape, np.float32
                    )
                part.flush()
    return str(folder / "model")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--storage", default="int8")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="export-memory-") as name:
        folder = Path(name)
        model = write_model(folder, options.rows, options.dim)
        words = ["export", "--model", model, "--out", str(folder / "export"), "--index", "none"]
        start = time.monotonic()
        command = [sys.executable, "-c", RUN, *words, "--storage", options.storage]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        seconds, peak = time.monotonic() - start, 1024 * int(said[-1])
        share = 4 * options.rows * options.dim // RANKS
        size = sum(file.stat().st_size for file in (folder / "export").rglob("*") if file.is_file())
        result = {
            "rows": options.rows, "storage": options.storage, "seconds": seconds, "peak MB": peak / 1e6,
            "share of a rank MB": share / 1e6, "export MB": size / 1e6, "load": os.getloadavg()[0],
        }  # fmt: skip
        publish(str(__doc__).splitlines()[0], [result], out=options.out, settings=settings_of(vars(options)))


if __name__ == "__main__":
    main()
