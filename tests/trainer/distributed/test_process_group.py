"""One failing rank ends all of them, soon, with its message."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.errors import RankFailed

try:
    with process_group("cpu") as ranks:
        for step in range(1000):
            if ranks.rank == int(sys.argv[1]) and step == 3:
                raise InputError("part-7.parquet: row group 2: null in column user_id")
            if sys.argv[2] == "hang" and step == 3:
                dist.recv(torch.zeros(1), tag=7)  # from anyone: nobody sends
            dist.all_reduce(torch.ones(1))
except (InputError, RankFailed) as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("others", ["reduce", "hang"])
def test_the_other_rank_ends_with_the_message(failing, others, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(failing), others],
            env={
                **base,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PATH": str(Path(sys.executable).parent),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert "part-7.parquet: row group 2: null in column user_id" in errors[failing]
    want = f"rank {failing} failed: part-7.parquet: row group 2: null in column user_id"
    assert want in errors[1 - failing]
    assert time.monotonic() - start < 90  # the collective's own timeout is 600 s


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, str(ranks.device)) == (0, 1, "cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("version", "problem", "words"),
    [
        (None, None, "is a CPU build; expected the CUDA set"),
        ("13.0", RuntimeError("Found no NVIDIA driver on your system. Please check that"), "Found no NVIDIA driver"),
        ("13.0", RuntimeError("The NVIDIA driver on your system is too old (found 11040)"), "driver for CUDA 13.0"),
        ("13.0", None, "torch sees no CUDA device"),
    ],
)
def test_an_absent_device_is_refused_with_the_reason(monkeypatch, caplog, version, problem, words):
    def init():
        if problem:
            raise problem

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", version)
    monkeypatch.setattr("torch.cuda.init", init)
    with pytest.raises(InputError, match=f"device is cuda: .*{re.escape(words)}") as raised, process_group("cuda"):
        pass
    assert "\n" not in str(raised.value)
    monkeypatch.setattr("recpress.trainer.distributed.process_group.GPU", Path(__file__))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with process_group("auto") as ranks:
        assert ranks.device.type == "cpu"
    assert words in caplog.text
    assert "although this machine has a GPU" in caplog.text
