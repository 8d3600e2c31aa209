"""What checkpoints cost: training with and without them, and GB/s of saving and loading beside `dd` on the same disk.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --out checkpoint.json

Tables of --gigabytes (users x --dim, random or frozen) are trained on batches that lie in memory. Stretches of --steps
steps with one checkpoint in each, written beside training and written while training waits, alternate with stretches
without any; the cost is the median of (with - without) / without over neighbours in time. It is that of steps as long
as these: `ms a step` says how long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower import SideSpec, TwoTower
from recpress.trainer import run_state
from recpress.trainer.checkpoint import Checkpoints
from recpress.trainer.config import CheckpointConfig, OptimizerConfig
from recpress.trainer.distributed import process_group
from recpress.trainer.fit_config import FitConfig
from recpress.trainer.loop import fit
from recpress.trainer.optimizer import TrainOptimizer
from recpress.trainer.sharding import shard
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training import made_batch

MODES = ("none", "beside", "waiting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, default in (
        ("gigabytes", float, 1.0), ("dim", int, 128), ("batch", int, 2048), ("negatives", int, 4),
        ("steps", int, 100), ("repeat", int, 5), ("folder", str, "checkpoint-bench"), ("out", str, None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--strategy", choices=("random", "init-freeze"), default="random")
    args = parser.parse_args()
    args.items = 50_000
    args.users = int(args.gigabytes * 1e9 / (4 * args.dim)) - args.items
    torch.set_num_threads(1)
    with process_group("auto") as ranks:
        result = measure(args, ranks.device)
        if ranks.rank == 0:
            print(tabulate([list(result["shown"].values())], headers=list(result["shown"]), floatfmt=".3g"))
            if args.out:
                Path(args.out).write_text(json.dumps(vars(args) | result, indent=1) + "\n")


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TwoTower(
        TwoTowerConfig(
            tables=TablesConfig(strategy=args.strategy, dim=args.dim),
            towers=TowersConfig(kind="mlp", hidden=(256,)),
            loss=LossConfig(),
        ),
        SideSpec(key="user", rows=args.users, dim=args.dim),
        SideSpec(key="item", rows=args.items, dim=args.dim),
        tables_device="meta",
    )
    dmp = shard(model, device, batch_size=args.batch)
    optimizer = TrainOptimizer(dmp, OptimizerConfig(), args.steps)
    batches = [made_batch(args, 1000 * dist.get_rank() + seed, device) for seed in range(min(args.steps, 20))]
    describe: dict[str, Any] = {"config": {}, "inputs": {}, "global_batch": 0}

    def stretch(mode: str) -> float:
        """Seconds of `steps` steps, of the slowest rank. The checkpoint begins with them, so that its writing lies
        beside them; what is left of it at their end is waited for, and counts."""
        config = CheckpointConfig(steps=args.steps + 1, minutes=0, resume=False, background=mode == "beside")
        checkpoints = held[mode]
        if checkpoints is not None:
            object.__setattr__(checkpoints, "config", config)
        state = run_state.everything(dmp, optimizer)
        dist.barrier()
        start = time.perf_counter()
        if checkpoints is not None:
            checkpoints.save(state, {}, 1)
        fit(
            dmp, optimizer, lambda epoch, first: (batches[k % len(batches)] for k in range(args.steps)),
            FitConfig(log_every=args.steps), device=device, show_progress=False,
        )  # fmt: skip
        if checkpoints is not None:
            checkpoints.wait()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    held: dict[str, Checkpoints | None] = {"none": None}
    for mode in MODES[1:]:
        held[mode] = Checkpoints(CheckpointConfig(resume=False), f"{args.folder}/{mode}", describe)
    stretch("none")
    stretch("beside")  # makes the buffers of the copy
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.repeat):
        for mode in MODES:
            times[mode].append(stretch(mode))
    cost = {
        mode: statistics.median((a - b) / b for a, b in zip(times[mode], times["none"], strict=True))
        for mode in MODES[1:]
    }
    path = Path(args.folder) / "beside" / "step-00000001"
    total = sum(file.stat().st_size for file in path.iterdir())
    checkpoints = held["waiting"]
    assert checkpoints is not None
    state = run_state.everything(dmp, optimizer)
    copy = seconds_of(lambda: checkpoints._staged.copy(state))
    object.__setattr__(checkpoints, "config", CheckpointConfig(background=False))
    save = seconds_of(lambda: checkpoints.save(state, {}, 1))

    def load() -> None:
        found = Checkpoints(CheckpointConfig(), f"{args.folder}/waiting", describe).start
        assert found is not None
        found.load(state, checkpoints.group)

    read = seconds_of(load)
    disk = dd(Path(args.folder) / "dd", total) if dist.get_rank() == 0 else (0.0, 0.0)
    shown = {
        "strategy": args.strategy,
        "tables GB": args.gigabytes,
        "checkpoint GB": total / 1e9,
        "ranks": dist.get_world_size(),
        "ms a step": 1e3 * statistics.median(times["none"]) / args.steps,
        "cost beside": cost["beside"],
        "cost waiting": cost["waiting"],
        "copy s": copy,
        "save GB/s": total / 1e9 / save,
        "dd write GB/s": disk[0],
        "verify and load GB/s": total / 1e9 / read,
        "dd read GB/s": disk[1],
    }
    return {"shown": shown, "times": times}


def seconds_of(work: Any) -> float:
    """Median of three, of the slowest rank."""
    found = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(float(seconds))
    return statistics.median(found)


def dd(path: Path, size: int) -> tuple[float, float]:
    """GB/s of writing (with fsync) and of reading what was written, both by `dd`, as the page cache has it."""
    blocks = max(1, size >> 20)
    found = []
    for command in (
        ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={blocks}", "conv=fsync"],
        ["dd", f"if={path}", f"of={os.devnull}", "bs=1M"],
    ):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append((blocks << 20) / 1e9 / (time.perf_counter() - start))
    path.unlink()
    return found[0], found[1]


if __name__ == "__main__":
    main()
