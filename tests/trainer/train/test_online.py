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
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, TablesConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import describe_log
from recpress.trainer.artifacts.id_maps import HASH, save_maps
from recpress.trainer.config import FollowConfig, OptimizerConfig, TrainConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train.online import _advice

USERS, ITEMS = 60, 40
# Notes what each step trains on, in a file that the same step of a later process overwrites.
WORKER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from recpress.trainer.loop import optimizer
from recpress.data.stream.batch import BatchBuilder
from recpress.trainer.cli import main

seen, rank, step_to_die = sys.argv[1], os.environ["RANK"], int(sys.argv[2])
ahead, made, take = [], BatchBuilder.__call__, optimizer.TrainOptimizer.step

def noted(self, rows):
    ahead.append((rows.user * 1000 + rows.item).tolist())
    return made(self, rows)

def step(self):
    take(self)
    with open(f"{seen}/{self.steps:05d}-{rank}", "w") as file:
        json.dump(ahead.pop(0), file)
    if self.steps == step_to_die and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)

BatchBuilder.__call__, optimizer.TrainOptimizer.step = noted, step
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
    run.wait_to_say("train-9.parquet: skipped for now, incomplete Parquet file")
    run.ranks[1].send_signal(signal.SIGTERM)
    assert run.end() == [75, 75], run.said()
    assert "step-00000015 at step 15, epoch 2" in run.said()
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


def write_maps(root):
    """Of the ids of the log as it is: 8 rows for the users, 6 for the items."""
    log = open_log(root / "log")
    maps = {}
    for side, rows in (("user", 8), ("item", 6)):
        of_ids = torch.arange(log.num_ids(side), dtype=torch.int32)[:, None] % rows
        maps[side] = IdMap(rows=of_ids, num_rows=rows, vocabulary=log.vocabulary_fingerprint(side))
    with artifact.writing(root / "maps", HASH, {"log": describe_log(log)}) as tmp:
        save_maps(maps, tmp)


def with_new_ids(numbers, users, items):
    """`table` with this many users, then this many items, that the first files do not have."""
    found = {name: column.to_numpy().copy() for name, column in zip(("user", "item"), table(numbers), strict=True)}
    found["user"][:users] += USERS
    found["item"][users : users + items] += ITEMS
    order = np.random.default_rng(1).permutation(len(found["user"]))
    return pa.table({f"{name}_id": column[order] for name, column in found.items()})


def test_maps_take_ids_that_came_since_and_each_is_counted_once(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(table(range(600)), log / "train-0.parquet", row_group_size=200)
    write_maps(tmp_path)
    als = ALSConfig(factors=4, sweeps=1, auto=False)
    factorize(FactorizeConfig(data=str(log), out=str(tmp_path / "factors"), als=als))
    options = (
        "--hash", str(tmp_path / "maps"), "--factors", str(tmp_path / "factors"), "--model.tables.strategy",
        "frozen", "--model.towers.kind", "residual", "--model.loss.kind", "softmax", "--model.loss.in-batch",
        "--negatives.reject-positives", "yes", "--negatives.shared",
    )  # fmt: skip

    run = Run(tmp_path, *options, step_to_die=18)  # 10 steps of the first file, then 10 of the next
    run.wait_for(10)
    pq.write_table(with_new_ids(range(600, 1240), users=37, items=11), log / ".coming", row_group_size=100)
    os.rename(log / ".coming", log / "train-1.parquet")
    assert run.end()[1] == -signal.SIGKILL, run.said()

    run = Run(tmp_path, *options, "--follow.idle-minutes", "0.03")
    assert run.end() == [0, 0], run.said()
    assert "step-00000015 at step 15" in run.said()
    assert "rows with users that the map does not know (37 in total)" in run.said()
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["unknown_ids"] == {"user": 37, "item": 11}
    assert (manifest["rows"], manifest["steps"]) == (1240, 20)
    last = json.loads((tmp_path / "model" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["hash/unknown_users"], last["hash/unknown_items"]) == (37.0, 11.0)
    assert np.isfinite(last["train/loss"])


def test_without_maps_new_ids_are_refused_before_a_row_of_their_round(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(table(range(600)), log / "train-0.parquet")
    run = Run(tmp_path, world=1)
    run.wait_for(1)
    pq.write_table(with_new_ids(range(600, 700), users=1, items=0), log / ".coming", row_group_size=20)
    os.rename(log / ".coming", log / "train-1.parquet")
    assert run.end() == [2], run.said()
    last = run.said().splitlines()[-1]
    assert "train-1.parquet, row group " in last
    assert "is outside the vocabulary of 60 ids; the table has the users of the files of the start: give maps" in last
    assert last.endswith("or start a new run with this file in the log, with larger tables")
    assert steps(tmp_path) == 19


@pytest.mark.parametrize(
    ("strategy", "mapped", "features", "text"),
    [
        ("random", True, (), None),
        ("frozen", True, (), None),
        ("random", True, ("age",), "users.parquet was read at the start and has no age of it: start a new run"),
        ("random", False, (), "start a new run with this file in the log, with larger tables"),
        ("frozen", False, (), "factorize the log with this file, and start a new run from these factors"),
        ("warm-start", False, (), "factorize the log with this file, and start a new run from these factors"),
    ],
)
def test_what_to_do_about_new_ids(strategy, mapped, features, text):
    config = TrainConfig(
        data="log",
        out="out",
        model=TwoTowerConfig(tables=TablesConfig(strategy=strategy)),
        user_features=features,
        optimizer=OptimizerConfig(schedule="constant"),
        follow=FollowConfig(online=True),
    )
    found = _advice(config, "user", mapped)
    assert (found is None) == (text is None)
    assert text is None or found.endswith(text)


def test_settings_that_need_an_end_are_refused():
    follow = FollowConfig(online=True)
    with pytest.raises(InputError, match=r"optimizer.schedule is 'cosine', .*expected constant"):
        TrainConfig(data="log", out="out", follow=follow, optimizer=OptimizerConfig(schedule="cosine"))
    with pytest.raises(InputError, match="stop_after: expected 0 with follow"):
        TrainConfig(data="log", out="out", follow=follow, stop_after=1, optimizer=OptimizerConfig(schedule="constant"))
    with pytest.raises(InputError, match=r"seconds is 0, expected at least 0.01"):
        FollowConfig(online=True, seconds=0)
