"""What does a checkpoint cost, and how fast is it saved and loaded, compared with `dd` on the same disk?

Takes 20 s small, 3 minutes full, alone on two cores.

    torchrun --nproc-per-node 2 benchmarks/checkpoint.py --out checkpoint.json

Tables of --gigabytes (users x --dim, random or frozen) are trained on batches in memory. Stretches of --steps steps
with one checkpoint each, written in the background or while training waits, alternate with stretches without one.
`beside %`: time that the steps which begin before the checkpoint is complete, copy included, take above the median of
the other steps of the same stretch, as a share of the stretch. The peer is in the same stretch, so that a slow period
of the machine changes nothing. `whole stretches %`: median of (with - without) / without over neighbors in time, mostly
noise on a shared machine (`from, to`). `ms a step`: length of the steps, on which all costs depend. `CPU s a
checkpoint`: processor time of copying and writing, of all ranks; `of CPU time`: its share of that of a stretch without.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recpress.benchmarks.common import bars, publish, settings_of
from recpress.benchmarks.loops import random_batch
from recpress.data.stream.batch import Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig, OptimizerConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.loop import run_state
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import SHARDING_TYPES, shard

SMALL = ("--gigabytes", "0.1", "--steps", "20", "--repeat", "2")
RANKS = True

MODES = ("none", "beside", "waiting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, default in (
        ("gigabytes", float, 1.0), ("dim", int, 128), ("batch", int, 2048), ("negatives", int, 4),
        ("steps", int, 100), ("repeat", int, 4), ("folder", str, "checkpoint-bench"), ("out", str, None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--strategy", choices=("random", "frozen"), default="random")
    parser.add_argument("--sharding", choices=("planner", *SHARDING_TYPES), default="planner")
    args = parser.parse_args()
    args.items = 50_000
    args.users = int(args.gigabytes * 1e9 / (4 * args.dim)) - args.items
    if args.users < 1:
        parser.error(f"--gigabytes {args.gigabytes}: expected at least {4e-9 * args.dim * (args.items + 1):.2g}")
    if Path(args.folder).exists():
        parser.error(f"--folder {args.folder}: exists; expected a new one, which is removed at the end")
    torch.set_num_threads(1)
    with process_group("auto") as ranks:
        try:
            row = measure(args, ranks.device)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(args.folder, ignore_errors=True)
        if ranks.rank == 0:
            question = f"What a checkpoint every {args.steps} steps costs, and GB/s compared with dd"
            publish(question, [row], out=args.out, settings=settings_of(vars(args), ("out", "folder")),
                    device=ranks.device, plots=[
                        bars(["beside %", "of CPU time %"], ["tables", "sharding"],
                             title="Of the stretch that it is in, by the clock, and of its processor time"),
                        bars(["save GB/s", "dd write GB/s", "verify and load GB/s", "dd read GB/s"],
                             ["tables", "sharding"], title="To and from the disk, compared with dd"),
                    ])  # fmt: skip


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
    forced = {} if args.sharding == "planner" else dict.fromkeys(("user", "item"), args.sharding)
    dmp = shard(model, device, batch_size=args.batch, sharding_types=forced)
    optimizer = TrainOptimizer(dmp, OptimizerConfig(), args.steps)
    batches = [random_batch(args, 1000 * dist.get_rank() + seed, device) for seed in range(min(args.steps, 20))]
    describe: dict[str, Any] = {"config": {}, "inputs": {}, "global_batch": 0}
    checkpoints = Checkpoints(CheckpointConfig(resume=False, keep=1), args.folder, describe)
    spent = [0.0]  # of the processor by this rank's copies and writing
    checkpoints._staged.copy = computing(checkpoints._staged.copy, spent)  # type: ignore[method-assign]
    checkpoints._write = computing(checkpoints._write, spent)  # type: ignore[method-assign]

    state = run_state.trained(dmp, optimizer)
    # Of a stretch: when each batch was requested, and whether a checkpoint was in progress.
    steps: list[tuple[float, bool]] = []

    def feed(mode: str) -> Iterator[Batch]:
        """A checkpoint begins between two of the batches: the pipeline is full, and most steps are to come."""
        for k in range(args.steps):
            begins = mode != "none" and k == args.steps // 5
            writer = checkpoints._writer
            steps.append((time.perf_counter(), begins or (writer is not None and writer.is_alive())))
            if begins:
                checkpoints.save(state, {}, 1)
            yield batches[k % len(batches)]

    def stretch(mode: str) -> tuple[float, float]:
        """Seconds of `steps` steps, of the slowest rank, and of the processors, of all ranks: of everything without a
        checkpoint, of the checkpoint with one. The rest of its writing at their end counts too."""
        checkpoints.config = CheckpointConfig(keep=1, background=mode == "beside")
        steps.clear()
        dist.barrier()
        start, before, spent[0] = time.perf_counter(), time.process_time(), 0.0
        fit(
            dmp, optimizer, lambda epoch, first: feed(mode), FitConfig(log_every=args.steps), device=device,
            show_progress=False,
        )  # fmt: skip
        checkpoints.wait()
        seconds = time.perf_counter() - start
        used = torch.tensor(time.process_time() - before if mode == "none" else spent[0], dtype=torch.float64)
        dist.all_reduce(used)
        return slowest(seconds), float(used)

    stretch("none")
    stretch("beside")  # makes the buffers of the copy
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    computed: dict[str, list[float]] = {mode: [] for mode in MODES}
    beside: list[float] = []
    for _ in range(args.repeat):
        for mode in MODES:
            seconds, used = stretch(mode)
            times[mode].append(seconds)
            computed[mode].append(used)
            if mode == "beside":
                beside.append(100 * above_other_steps(steps))
    cost = {
        mode: sorted(100 * (a - b) / b for a, b in zip(times[mode], times["none"], strict=True)) for mode in MODES[1:]
    }
    of_cpu = [100 * a / b for a, b in zip(computed["beside"], computed["none"], strict=True)]
    total = sum(file.stat().st_size for file in (Path(args.folder) / "step-00000001").iterdir())
    layout = checkpoints._layout(state)
    copy = seconds_of(lambda: checkpoints._staged.copy(state, layout.ranges))
    checkpoints.config = CheckpointConfig(keep=1, background=False)
    save = seconds_of(lambda: checkpoints.save(state, {}, 1))

    def load() -> None:
        found = checkpoints.newest()  # verifies the checksums
        assert found is not None
        found.load(state, checkpoints.group)

    read = seconds_of(load)
    if checkpoints.failures:
        raise RuntimeError(f"{checkpoints.failures} checkpoints were not written")
    disk = dd(Path(args.folder) / "dd", total) if dist.get_rank() == 0 else (0.0, 0.0)
    return {
        "tables": args.strategy,
        "tables GB": args.gigabytes,
        "checkpoint GB": total / 1e9,
        "ranks": dist.get_world_size(),
        "sharding": args.sharding,
        "ms a step": 1e3 * statistics.median(times["none"]) / args.steps,
        "beside %": statistics.median(beside),
        "lowest, highest": f"{min(beside):.1f}, {max(beside):.1f}",
        "whole stretches %": statistics.median(cost["beside"]),
        "from, to": f"{cost['beside'][0]:.1f}, {cost['beside'][-1]:.1f}",
        "of CPU time %": statistics.median(of_cpu),
        "CPU s a checkpoint": statistics.median(computed["beside"]),
        "waiting %": statistics.median(cost["waiting"]),
        "copy s": copy,
        "save GB/s": total / 1e9 / save,
        "dd write GB/s": disk[0],
        "verify and load GB/s": total / 1e9 / read,
        "dd read GB/s": disk[1],
    }


def above_other_steps(steps: list[tuple[float, bool]]) -> float:
    """Time that a checkpoint added to a stretch, as a share of the stretch: of the steps that began before it was
    complete, the time above the median of the others. Of the slowest rank.

    Args:
        steps: when each began, in seconds, and whether a checkpoint was in progress.
    """
    took = [(after - begin, in_progress) for (begin, in_progress), (after, _) in itertools.pairwise(steps)]
    usual = statistics.median(seconds for seconds, in_progress in took if not in_progress)
    added = sum(seconds - usual for seconds, in_progress in took if in_progress)
    return slowest(added / (usual * len(steps)))


def computing(work: Callable[..., None], spent: list[float]) -> Callable[..., None]:
    """`work` that adds the seconds of the processor of its thread."""

    def counted(*args: Any) -> None:
        start = time.thread_time()
        work(*args)
        spent[0] += time.thread_time() - start

    return counted


def slowest(seconds: float) -> float:
    """Of the ranks."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def seconds_of(work: Callable[[], Any]) -> float:
    """Median of three, of the slowest rank."""
    found = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        work()
        found.append(slowest(time.perf_counter() - start))
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
