"""One failing rank ends all of them, soon, with its message."""

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


def test_an_absent_device_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="device is cuda"), process_group("cuda"):
        pass
