"""Speed of a training step: our loop against a bare TorchRec loop, and frozen tables against trained ones.

    python benchmarks/train_step.py --out train_step.json          # or under torchrun

Everything runs on the same batches, already in memory; runs are interleaved, and ratios are medians of
neighbours in time. On a CPU that others use too, the ratios of CPU time say more than those of wall time.
`ratio_fit_to_bare` is rows/s of `trainer.loop.fit` (pipeline, losses read, log lines) over rows/s of
zero_grad, forward, backward, step on the same DistributedModelParallel model, without anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from recpress.data.batch import ITEM, USER, Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower import SideSpec, TwoTower
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.distributed import process_group
from recpress.trainer.loop import FitConfig, fit
from recpress.trainer.metrics_log import MetricsLog
from recpress.trainer.optimizer import TrainOptimizer
from recpress.trainer.sharding import shard
from torchrec import KeyedJaggedTensor

STRATEGIES = ("init-freeze", "init-train")


def made_batch(args: argparse.Namespace, seed: int, device: torch.device) -> Batch:
    """Ids fall off as 1 / rank, as those of a log do; negatives are uniform."""
    rng = np.random.default_rng(seed)

    def skewed(num: int, count: int) -> torch.Tensor:
        return torch.from_numpy((num ** rng.random(count) - 1).astype(np.int64).clip(0, num - 1))

    negatives = torch.from_numpy(rng.integers(0, args.items, args.batch * args.negatives))
    users, items = skewed(args.users, args.batch), torch.cat([skewed(args.items, args.batch), negatives])
    return Batch(
        keyed(USER, users),
        keyed(ITEM, items),
        torch.ones(args.batch),
        torch.full((len(items),), -float(np.log(args.items))),
    ).to(device)


def keyed(key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([key], ids, lengths=torch.ones_like(ids, dtype=torch.int32), stride=len(ids))


class Subject:
    """One model, timed in both loops."""

    def __init__(self, strategy: str, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        config = TwoTowerConfig(
            tables=TablesConfig(strategy=strategy, storage=args.storage),
            towers=TowersConfig(kind="residual", hidden=tuple(args.hidden)),
            loss=LossConfig(kind=args.loss),
        )
        model = TwoTower(
            config,
            SideSpec(key=USER, rows=args.users, dim=args.dim),
            SideSpec(key=ITEM, rows=args.items, dim=args.dim),
            tables_device="meta",
        )
        self.model = shard(model, device, batch_size=args.batch)
        rng = np.random.default_rng(1)
        self.model.module.load_factors(
            *(rng.normal(0, 0.3, (n, args.dim)).astype(np.float32) for n in (args.users, args.items))
        )
        self.args, self.device = args, device
        self.optimizer = TrainOptimizer(self.model, OptimizerConfig(), args.steps)

    def bare(self, batches: list[Batch]) -> tuple[float, float]:
        """rows of this rank a second, and a second of its CPU time."""
        self.model.train()
        start = self._now()
        for batch in batches:
            self.optimizer.zero_grad()
            loss, _ = self.model(batch)
            loss.backward()
            self.optimizer.step()
        return self._speed(batches, start)

    def fit(self, batches: list[Batch]) -> tuple[float, float]:
        """rows of this rank a second, and a second of its CPU time."""
        with tempfile.TemporaryDirectory() as folder, MetricsLog(folder) as log:
            start = self._now()
            fit(
                self.model,
                self.optimizer,
                lambda epoch, first: batches[first:],
                FitConfig(epochs=1),
                device=self.device,
                log=log,
                show_progress=False,
            )
            return self._speed(batches, start)

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _speed(self, batches: list[Batch], start: tuple[float, float]) -> tuple[float, float]:
        rows = len(batches) * self.args.batch
        wall, cpu = (after - before for after, before in zip(self._now(), start, strict=True))
        return rows / wall, rows / cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--hidden", type=int, nargs="*", default=[256])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--storage", default="fp32")
    parser.add_argument("--loss", default="bce")
    parser.add_argument("--steps", type=int, default=40, help="of one run")
    parser.add_argument("--runs", type=int, default=7, help="of each kind, interleaved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with process_group(args.device) as ranks:
        batches = [made_batch(args, 1000 * ranks.rank + i, ranks.device) for i in range(args.steps)]
        subjects = {strategy: Subject(strategy, args, ranks.device) for strategy in STRATEGIES}
        runs: dict[str, list[tuple[float, float]]] = {f"{s}/{loop}": [] for s in STRATEGIES for loop in ("bare", "fit")}
        for run in range(args.runs + 1):  # the first one warms up
            for name, found in runs.items():
                strategy, loop = name.split("/")
                dist.barrier()
                speed = getattr(subjects[strategy], loop)(batches)
                if run:
                    found.append(speed)
        wall = {name: [pair[0] for pair in found] for name, found in runs.items()}
        cpu = {name: [pair[1] for pair in found] for name, found in runs.items()}
        result = {
            "device": str(ranks.device),
            "ranks": ranks.world,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            **{k: v for k, v in vars(args).items() if k not in ("out", "device")},
            "wall": summary(wall),
            "cpu_time": summary(cpu),
        }
        if ranks.rank == 0:
            print(json.dumps(result, indent=2))
            if args.out:
                Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def summary(speeds: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    return {
        "rows_per_second_per_rank": {name: round(statistics.median(f)) for name, f in speeds.items()},
        "spread": {name: [round(min(f)), round(max(f))] for name, f in speeds.items()},
        "ratio_fit_to_bare": {s: ratio(speeds[f"{s}/fit"], speeds[f"{s}/bare"]) for s in STRATEGIES},
        "ratio_freeze_to_train": {
            loop: ratio(speeds[f"init-freeze/{loop}"], speeds[f"init-train/{loop}"]) for loop in ("bare", "fit")
        },
    }


def ratio(these: list[float], those: list[float]) -> float:
    """Median of the ratios of runs that were neighbours in time."""
    return round(statistics.median(a / b for a, b in zip(these, those, strict=True)), 3)


if __name__ == "__main__":
    main()
