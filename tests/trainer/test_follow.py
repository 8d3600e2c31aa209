"""Runs that follow a log: two processes, files that come, kills and signals; each row is trained on exactly once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recpress.data.errors import InputError
from recpress.trainer.config import FollowConfig, OptimizerConfig, TrainConfig

USERS, ITEMS = 60, 40
# Notes what each step trains on, in a file that the same step of a later process overwrites.
WORKER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from recpress.trainer import optimizer, train
from recpress.trainer.cli import main

seen, rank, step_to_die = sys.argv[1], os.environ["RANK"], int(sys.argv[2])
ahead, checked, take = [], train._checked, optimizer.TrainOptimizer.step

def noted(rows, stream):
    ahead.append((rows.user * 1000 + rows.item).tolist())
    return checked(rows, stream)

def step(self):
    take(self)
    with open(f"{seen}/{self.steps:05d}-{rank}", "w") as file:
        json.dump(ahead.pop(0), file)
    if self.steps == step_to_die and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)

train._checked, optimizer.TrainOptimizer.step = noted, step
sys.exit(main(sys.argv[3:]))
"""


def table(numbers):
    """Row k has the k-th pair of all pairs, shuffled; the first rows have every id."""
    pairs = np.random.default_rng(0).permutation(USERS * ITEMS)[np.asarray(numbers)]
    return pa.table({"user_id": pairs // ITEMS, "item_id": pairs % ITEMS})


def keys(numbers):
    found = table(numbers)
    return Counter((found["user_id"].to_numpy() * 1000 + found["item_id"].to_numpy()).tolist())


def settings(root):
    return [
        "--data", str(root / "log"), "--out", str(root / "model"), "--model.tables.strategy", "random",
        "--model.tables.dim", "4", "--model.towers.kind", "mlp", "--model.towers.hidden", "4", "--sample.rate", "1",
        "--stream.batch-size", "32", "--epochs", "1", "--optimizer.schedule", "constant", "--no-tensorboard",
        "--negatives.count", "4", "--checkpoint.steps", "5", "--checkpoint.no-background", "--follow",
        "--follow.seconds", "0.2",
    ]  # fmt: skip


class Run:
    """Ranks of `recpress train --follow`, each a process."""

    def __init__(self, root: Path, *more: str, world: int = 2, step_to_die: int = 0) -> None:
        (root / "worker.py").write_text(WORKER)
        (root / "seen").mkdir(exist_ok=True)
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        base |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(root / "worker.py"), str(root / "seen"), str(step_to_die)]
        self.ranks = []
        for rank in range(world):
            with open(root / f"stderr-{rank}", "w") as stderr:
                env = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen([*command, "train", *settings(root), *more], env=env, stderr=stderr)
                self.ranks.append(process)

    def wait_for(self, step: int) -> None:
        """Until the ranks have trained on this step."""
        files = [self.root / "seen" / f"{step:05d}-{rank}" for rank in range(len(self.ranks))]
        self._wait(lambda: all(file.exists() for file in files))

    def wait_to_say(self, text: str) -> None:
        self._wait(lambda: text in self.said())

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not done():
            assert time.monotonic() < deadline, self.said()
            assert all(rank.poll() is None for rank in self.ranks), self.said()
            time.sleep(0.05)

    def end(self) -> list[int]:
        try:
            return [rank.wait(timeout=120) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
                rank.wait()

    def said(self) -> str:
        return "\n".join((self.root / f"stderr-{rank}").read_text() for rank in range(len(self.ranks)))


def seen(root):
    """Rows by how often they were trained on. A step of one rank takes the place of the steps of two."""
    return sum((Counter(json.loads(path.read_text())) for path in (root / "seen").iterdir()), Counter())


def steps(root):
    return max(int(path.name[:5]) for path in (root / "seen").iterdir())


def test_each_row_once_through_kills_and_signals(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(table(range(600)), log / "train-0.parquet", row_group_size=200)
    pq.write_table(table(range(600, 800)), log / "train-1.parquet", row_group_size=200)
    pq.write_table(table(range(1440, 1640)), tmp_path / "last.parquet")
    last = (tmp_path / "last.parquet").read_bytes()

    run = Run(tmp_path, step_to_die=18)  # 13 steps of the first files, then 10 of the next
    run.wait_for(1)
    (log / "train-9.parquet").write_bytes(last[: len(last) // 2])  # half-written
    (log / ".train-8.parquet").write_bytes(last)  # another writer's temporary name
    pq.write_table(table(range(800, 1440)), log / ".coming", row_group_size=100)
    os.rename(log / ".coming", log / "train-2.parquet")
    status = run.end()
    assert status[1] == -signal.SIGKILL, run.said()
    assert status[0] != 0
    assert steps(tmp_path) >= 18

    run = Run(tmp_path)
    run.wait_for(23)  # the end of the round; then it waits
    run.wait_to_say("train-9.parquet: not taken, not a whole Parquet file (yet)")
    run.ranks[1].send_signal(signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    assert "step-00000015: step 15, epoch 2" in run.said()
    assert "stopped by" in run.said()
    assert seen(tmp_path) == keys(range(1440))
    assert steps(tmp_path) == 23

    (log / "train-9.parquet").write_bytes(last)
    run = Run(tmp_path, "--follow.idle-minutes", "0.03", world=1)
    assert run.end() == [0], run.said()
    assert "round 2: train-9.parquet, 200 rows of the sample" in run.said()
    assert seen(tmp_path) == keys(range(1640))
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    names = [[Path(file["name"]).name for file in files] for files in manifest["rounds"]]
    assert names == [["train-0.parquet", "train-1.parquet"], ["train-2.parquet"], ["train-9.parquet"]]
    assert (manifest["rows"], manifest["steps"]) == (1640, 27)
    assert not (tmp_path / "model.checkpoints").exists()


def test_settings_that_need_an_end_are_refused():
    follow = FollowConfig(on=True)
    with pytest.raises(InputError, match=r"optimizer.schedule is 'cosine', .*expected constant"):
        TrainConfig(data="log", out="out", follow=follow)
    with pytest.raises(InputError, match="stop_after: expected 0 with follow"):
        TrainConfig(data="log", out="out", follow=follow, stop_after=1, optimizer=OptimizerConfig(schedule="constant"))
    with pytest.raises(InputError, match=r"seconds is 0, expected at least 0.01"):
        FollowConfig(on=True, seconds=0)
