"""What ends a real run of several processes, from outside: killed, preempted, stalled, another version."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from recpress.trainer.cli import main

WORKER = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from recpress.trainer.distributed import rank_errors
from recpress.trainer.loop import optimizer
from recpress.trainer.cli import main

what, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
take = optimizer.TrainOptimizer.step

def fault(self):
    take(self)
    if self.steps == step and int(os.environ["RANK"]) == rank:
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "sleep":
            time.sleep(60)
        elif what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))

optimizer.TrainOptimizer.step = fault
if what == "writing":  # a signal while the model is written, after the last step
    from recpress.trainer.train import stage

    def save(*_):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    stage.save_weights = save
if what == "code" and int(os.environ["RANK"]) == rank:
    rank_errors._code_digest = lambda: "0.0.9 abc"
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A log, its factors, and the worker."""
    root = tmp_path_factory.mktemp("failures")
    (root / "worker.py").write_text(WORKER)
    synth = ["--users", "200", "--items", "100", "--rows", "4000", "--tastes", "6", "--held-out-users", "0"]
    assert main(["synth", "--out", str(root / "log"), *synth]) == 0
    factorize = ["--als.factors", "8", "--als.sweeps", "2"]
    assert main(["factorize", "--data", str(root / "log"), "--out", str(root / "factors"), *factorize]) == 0
    return root


def ranks(root: Path, out: str, fault: tuple[str, int, int] = ("none", 0, 0), world: int = 2, *more: str):
    """(exit statuses, what each rank said, seconds) of `recpress train` on processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = [
        "--data", str(root / "log"), "--factors", str(root / "factors"), "--out", str(root / out),
        "--model.tables.strategy", "warm-start", "--sample.rate", "1", "--stream.batch-size", str(128 // world),
        "--epochs", "1", "--no-tensorboard", "--checkpoint.steps", "5", "--evaluation.every", "0", *more,
    ]  # fmt: skip
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    base |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(root / "worker.py"), *map(str, fault), "train", *settings]
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            command, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    waiting = [p for rank, p in enumerate(processes) if not (fault[0] == "stop" and rank == fault[1])]
    try:
        said = {p: p.communicate(timeout=150)[1] for p in waiting}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [p.returncode for p in processes], [said.get(p, "") for p in processes], time.monotonic() - begin


def weights(path: Path) -> dict[str, bytes]:
    files = [p for p in sorted((path / "weights").rglob("*")) if p.is_file() and p.suffix == ".npy"]
    return {str(p.relative_to(path)): np.load(p).tobytes() for p in files}


@pytest.fixture(scope="module")
def quiet(folder):
    status, said, _ = ranks(folder, "quiet")
    assert status == [0, 0], said
    assert not (folder / "quiet.checkpoints").exists()
    return weights(folder / "quiet")


def test_killed_and_preempted_it_goes_on_to_the_same_weights(folder, quiet):
    status, said, _ = ranks(folder, "a", ("SIGKILL", 1, 13))
    assert status[1] == -signal.SIGKILL
    assert status[0] != 0
    assert not (folder / "a").exists()
    left = sorted(path.name for path in (folder / "a.checkpoints").glob("step-*"))
    assert left[-1] in ("step-00000005", "step-00000010")  # the second may have been under way

    status, said, _ = ranks(folder, "a", ("SIGUSR1", 1, 21))
    assert status == [75, 75], said
    assert f"resuming from checkpoint {folder}/a.checkpoints/{left[-1]}" in said[0]
    assert "stopped by" in said[0]
    assert "after step 22" in said[0]

    status, said, _ = ranks(folder, "a")
    assert status == [0, 0], said
    assert "step-00000022 at step 22, epoch 1" in said[0]
    assert weights(folder / "a") == quiet
    assert not (folder / "a.checkpoints").exists()
    steps = [json.loads(line)["step"] for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_signal_while_the_model_is_written_costs_no_step(folder, quiet):
    status, said, _ = ranks(folder, "w", ("writing", 0, 0))
    assert status == [75, 75], said
    assert "rerun the same command to resume from" in said[0]
    assert not [path for path in folder.iterdir() if path.name.startswith(".w")]
    status, said, _ = ranks(folder, "w")
    assert status == [0, 0], said
    steps = json.loads((folder / "quiet" / "manifest.json").read_text())["steps"]
    assert f"step {steps}" in said[0]
    assert " steps (" not in said[0]  # none was taken again
    assert weights(folder / "w") == quiet


def test_one_rank_goes_on_where_two_were(folder, quiet):
    ranks(folder, "b", ("SIGTERM", 0, 12))
    status, said, _ = ranks(folder, "b", ("none", 0, 0), 1, "--stream.batch-size", "64")
    assert status == [0], said
    manifest = json.loads((folder / "b" / "manifest.json").read_text())
    assert manifest["steps"] == json.loads((folder / "quiet" / "manifest.json").read_text())["steps"]
    shutil.rmtree(folder / "b")


@pytest.mark.parametrize(
    ("fault", "says"),
    [("stop", "rank 1 stalled: the others wait at step 8 for"), ("sleep", "rank 1 stalled at step 7 for")],
)
def test_a_rank_that_stalls_is_named_with_its_step(folder, fault, says):
    status, said, seconds = ranks(folder, fault, (fault, 1, 7), 2, "--stall-seconds", "5")
    assert status[0] == 2, said
    assert says in said[0]
    assert seconds < 90


def test_another_version_of_the_code_on_one_rank_is_an_error_on_both(folder):
    status, said, _ = ranks(folder, "code", ("code", 1, 0))
    assert status == [2, 2], said
    for text in said:
        assert "rank 1 has another code of recpress than rank 0 (0.0.9 abc, expected " in text
    assert not (folder / "code.checkpoints").exists()
