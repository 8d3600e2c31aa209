"""Does a run that is killed at random steps end at the same bits as one that is not?

Takes 20 s small, 11 minutes full, while a demo and tests run.

    python benchmarks/kill_campaign.py --runs 50 --ranks 2 --out kill-campaign.json

Each run trains in its own processes, with a checkpoint every few steps. One random rank kills itself at a random step
and a random moment of it, one to three times; the others are killed a moment later, as a launcher does; the same
command is started again. A run passes if its weights equal those of an undisturbed run to the last bit, and if every
example of every epoch was trained on exactly once, without steps that later attempts rolled back.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.processes import free_port
from recpress.data.stream import batch as batch_module
from recpress.trainer.cli import main as recpress
from recpress.trainer.loop import optimizer as optimizer_module
from recpress.trainer.train import stage as train_module  # noqa: F401  # imported once, before the ranks are forked

SMALL = ("--runs", "1")

SETTINGS = (
    *("--sample.rate", "1", "--epochs", "2", "--stream.batch-size", "64", "--no-tensorboard"),
    *("--checkpoint.steps", "5", "--checkpoint.minutes", "0"),
    *("--evaluation.every", "1", "--evaluation.validation", "test"),
)
STRATEGIES = ("frozen", "warm-start", "frozen+residual")


def rank(number: int, world: int, port: int, arguments: list[str], seen: Path, kill: tuple[int, float] | None) -> None:
    """One process of a run: `recpress train`, which records the rows of each step, and kills itself at `kill`."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"{seen}.log", "a")  # noqa: SIM115
    taken: list[tuple[int, int, int]] = []
    build, step = batch_module.BatchBuilder.__call__, optimizer_module.TrainOptimizer.step

    def noting(self: Any, rows: Any) -> Any:
        taken.append((rows.epoch, rows.position, rows.size))
        return build(self, rows)

    def counted(self: Any) -> None:
        step(self)
        with open(f"{seen}.{number}", "a") as file:
            file.write(json.dumps([self.steps, *taken.pop(0)]) + "\n")
        if kill is not None and self.steps == kill[0]:
            threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()

    batch_module.BatchBuilder.__call__, optimizer_module.TrainOptimizer.step = noting, counted  # type: ignore[method-assign]
    os._exit(recpress(["train", *arguments]))


def attempt(world: int, arguments: list[str], seen: Path, kill: tuple[int, int, float] | None) -> bool:
    """Start the ranks; whether they ended by themselves. kill: (rank, step, seconds after it)."""
    port = free_port()
    context = mp.get_context("fork")
    processes = []
    for number in range(world):
        own = kill[1:] if kill is not None and kill[0] == number else None
        process = context.Process(target=rank, args=(number, world, port, arguments, seen, own))
        process.start()
        processes.append(process)
    while any(process.is_alive() for process in processes):
        time.sleep(0.02)
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(random.random() * 0.2)
            for process in processes:
                process.kill()
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


def weights(out: Path) -> str:
    """Of the bits of all weights, dense and tables."""
    digest = hashlib.sha256()
    for path in sorted((out / "weights").rglob("*.npy")):
        digest.update(path.name.encode() + np.load(path).tobytes())
    for name, tensor in sorted(torch.load(out / "weights" / "dense.pt", weights_only=True).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def lineage(attempts: list[Path], world: int) -> list[tuple[int, int, int]]:
    """(epoch, position, rows) of every step that the final weights come from, of all ranks."""
    found: list[tuple[int, int, int]] = []
    for number in range(world):
        steps: dict[int, tuple[int, int, int]] = {}
        for seen in attempts:
            path = Path(f"{seen}.{number}")
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if lines:  # what earlier attempts did from here on is rolled back
                steps = {step: what for step, what in steps.items() if step < lines[0][0]}
                steps |= {step: tuple(what) for step, *what in lines}
        assert sorted(steps) == list(range(1, len(steps) + 1)), "a step is missing"
        found += steps.values()
    return found


def rows_once(found: list[tuple[int, int, int]], quiet: list[tuple[int, int, int]]) -> tuple[int, int]:
    """(rows lost, rows seen twice), against the quiet run's."""

    def rows(steps: list[tuple[int, int, int]]) -> Counter[tuple[int, int]]:
        return Counter((epoch, at + k) for epoch, at, size in steps for k in range(size))

    have, want = rows(found), rows(quiet)
    assert max(want.values()) == 1
    return sum((want - have).values()), sum((have - want).values())


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kill-campaign-") as folder:
        root = Path(folder)
        made = ["--users", "300", "--items", "150", "--rows", "6000", "--tastes", "6", "--held-out-users", "50"]
        data = ["--data", str(root / "log")]
        for command in (
            ["synth", "--out", str(root / "log"), *made],
            ["factorize", *data, "--out", str(root / "factors"), "--als.factors", "8", "--als.sweeps", "2"],
        ):
            process = mp.get_context("fork").Process(target=lambda c=command: os._exit(recpress(c)))
            process.start()
            process.join()
            assert process.exitcode == 0, command
        quiet: dict[str, tuple[str, list[tuple[int, int, int]]]] = {}

        def train_options(strategy: str, out: Path) -> list[str]:
            own = ["--factors", str(root / "factors"), "--model.tables.strategy", strategy, "--out", str(out)]
            return [*data, *own, *SETTINGS]

        for strategy in STRATEGIES[: given.runs]:
            out, seen = root / f"quiet-{strategy}", root / f"seen-quiet-{strategy}"
            if not attempt(given.ranks, train_options(strategy, out), seen, None):
                print(Path(f"{seen}.log").read_text(), file=sys.stderr)
                return 1
            quiet[strategy] = weights(out), lineage([seen], given.ranks)
        steps = len(quiet[STRATEGIES[0]][1]) // given.ranks
        for run in range(given.runs):
            strategy, begin = STRATEGIES[run % len(STRATEGIES)], time.monotonic()
            kills = [
                (random.randrange(given.ranks), random.randint(1, steps), random.random() * 0.05)
                for _ in range(random.randint(1, 3))
            ]
            kills.sort(key=lambda kill: kill[1])
            out, died = root / f"run-{run}", 0
            attempts: list[Path] = []
            for kill in [*kills, None]:
                attempts.append(root / f"seen-{run}-{len(attempts)}")
                done = attempt(given.ranks, train_options(strategy, out), attempts[-1], kill)
                died += not done
                if done:
                    break
            if not done:
                print(Path(f"{attempts[-1]}.log").read_text(), file=sys.stderr)
            lost, twice = rows_once(lineage(attempts, given.ranks), quiet[strategy][1])
            same = done and weights(out) == quiet[strategy][0]
            results.append(
                {"strategy": strategy, "killed": died, "same": same, "lost": lost, "twice": twice}
                | {"steps_killed_at": [kill[1] for kill in kills], "seconds": round(time.monotonic() - begin, 1)}
            )
            print(json.dumps(results[-1]), flush=True)
    passed = sum(r["same"] and not r["lost"] and not r["twice"] for r in results)
    rows = []
    for strategy in STRATEGIES[: given.runs]:
        own = [r for r in results if r["strategy"] == strategy]
        total = {name: sum(r[name] for r in own) for name in ("killed", "lost", "twice")}
        rows.append(
            {"tables": strategy, "runs": len(own), "kills": total["killed"], "same bits": sum(r["same"] for r in own)}
            | {"rows lost": total["lost"], "rows seen twice": total["twice"]}
        )
    publish(
        f"Killed and started again: {passed} of {len(results)} runs end at the bits of the quiet run",
        rows,
        out=given.out,
        settings=settings_of(vars(given)) | {"steps": steps},
        plots=[bars(["runs", "same bits"], ["tables"], title="Runs, and those that end at the same bits")],
    )
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
