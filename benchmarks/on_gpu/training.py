"""A training step with each kind of tables: rows/s of our loop and of a bare one, and peak memory."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from recpress.benchmarks.loops import bare_loop, made_batch, our_loop
from recpress.benchmarks.on_gpu.device import kernels, synchronize
from recpress.benchmarks.remap import made_map
from recpress.data.stream.batch import ITEM, USER, Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard


@dataclass(frozen=True)
class Kind:
    """A way to keep the tables."""

    name: str
    strategy: str
    storage: str = "fp32"
    hashed: bool = False


KINDS = (
    Kind("trainable", "warm-start"),
    Kind("frozen fp32", "frozen"),
    Kind("frozen 8-bit", "frozen", "int8"),
    Kind("hashed, trainable", "warm-start", hashed=True),
    Kind("hashed, frozen fp32", "frozen", hashed=True),
    Kind("hashed, frozen 8-bit", "frozen", "int8", hashed=True),
)


def sizes(tiny: bool) -> argparse.Namespace:
    if tiny:
        return argparse.Namespace(users=400, items=200, dim=16, hidden=(16,), batch=32, negatives=2, steps=3, runs=1)
    return argparse.Namespace(
        users=4_000_000, items=500_000, dim=128, hidden=(256,), batch=8192, negatives=4, steps=50, runs=5
    )


class Subject:
    """One model with its optimizer, and the two loops over it."""

    def __init__(self, kind: Kind, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        config = TwoTowerConfig(
            tables=TablesConfig(strategy=kind.strategy, storage=kind.storage),  # type: ignore[arg-type]
            towers=TowersConfig(kind="residual", hidden=args.hidden),
            loss=LossConfig(kind="bce"),
        )
        maps: list[IdMap | None] = [None, None]
        if kind.hashed:
            maps = [made_map(ids, max(1, ids // 5), side) for side, ids in enumerate((args.users, args.items))]
        specs = [
            SideSpec(key=key, rows=ids, dim=args.dim, map=one)
            for key, ids, one in zip((USER, ITEM), (args.users, args.items), maps, strict=True)
        ]
        model = TwoTower(config, *specs, tables_device="meta")
        self.model = shard(model, device, batch_size=args.batch)
        factors = [(0.3 * torch.randn(ids, args.dim)).numpy() for ids in (args.users, args.items)]
        shared = [None if m is None else x[: m.num_rows] for m, x in zip(maps, factors, strict=True)]
        self.model.module.load_factors(*factors, rows=shared)
        self.args, self.device = args, device
        self.optimizer = TrainOptimizer(self.model, OptimizerConfig(), args.steps)

    def bare(self, batches: list[Batch]) -> None:
        bare_loop(self.model, self.optimizer, batches)

    def fit(self, batches: Any) -> None:
        our_loop(self.model, self.optimizer, batches, self.device)


def timed(loop: Callable[[Any], None], batches: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    loop(batches)
    synchronize(device)
    return time.perf_counter() - start


def rows(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """`peak MB` and `tables MB` are of the device: all that a run holds, and the tables as they are stored."""
    args, table = sizes(tiny), []
    batches = [made_batch(args, seed, device) for seed in range(args.steps)]
    for kind in KINDS:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        subject = Subject(kind, args, device)
        runs: dict[str, list[float]] = {"fit": [], "bare": []}
        for run in range(args.runs + 1):  # the first one warms up
            for name, found in runs.items():
                took = timed(getattr(subject, name), batches, device)
                if run:
                    found.append(took)
        done = args.batch * args.steps
        table.append(
            {
                "tables": kind.name,
                "rows/s, our loop": done / statistics.median(runs["fit"]),
                "rows/s, bare loop": done / statistics.median(runs["bare"]),
                "ours / bare": statistics.median(b / a for a, b in zip(runs["fit"], runs["bare"], strict=True)),
                "tables MB": sum(subject.model.module.table_bytes.values()) / 1e6,
                "peak MB": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
            }
        )
        del subject
    return table


def profiled(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    args, table = sizes(tiny), []
    if not tiny:
        args.users, args.items, args.steps = 1_000_000, 200_000, 20
    batches = [made_batch(args, seed, device) for seed in range(args.steps)]
    for kind in KINDS[:3]:
        subject = Subject(kind, args, device)
        table += kernels(partial(subject.bare, batches), device, f"{args.steps} steps, {kind.name}")
    return table
