"""Ranks wait for one that works alone as long as it takes, say for whom, and notice when it has gone silent."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys, time, torch, torch.distributed as dist
from recpress.data.errors import InputError
from recpress.trainer.errors import RankFailed
from recpress.trainer.distributed import watchdog as module
from recpress.trainer.distributed.heartbeat import WAITING_FOR_DATA, activity, heartbeat
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.observability.logging_setup import logging_to_stderr

module.BEAT_SECONDS, module._REPORT_SECONDS = 0.2, 1.0
try:
    with logging_to_stderr("test"), process_group("cpu", 2.0) as ranks:
        dist.all_reduce(torch.ones(1))
        if sys.argv[1] == "work":
            with raise_on_all_ranks(), activity("building maps"):
                if ranks.rank == 0:
                    time.sleep(5)
            if ranks.rank == 1:
                time.sleep(4)
            dist.all_reduce(torch.ones(1))
        elif sys.argv[1] == "stop":
            with raise_on_all_ranks():
                if ranks.rank == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
        else:
            with process_group("cpu", 1.0) as inner:
                heartbeat.in_step(7, WAITING_FOR_DATA if inner.rank else "in the step")
                if inner.rank == 1:
                    time.sleep(60)
                dist.all_reduce(torch.ones(1))
        print("done")
except (InputError, RankFailed) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def run(tmp_path: Path, what: str) -> list[tuple[int, str, str]]:
    """(status, output, errors) of two processes; one that is stopped is killed once the other has ended."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), what],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [processes[0].communicate(timeout=100)]
        if what == "stop":
            processes[1].send_signal(signal.SIGKILL)
        said.append(processes[1].communicate(timeout=100))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_a_rank_that_works_alone_is_waited_for_and_the_others_say_so(tmp_path):
    first, second = run(tmp_path, "work")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "waiting for rank 0: building maps, 1 s" in second[2]
    assert "waiting for" not in first[2]


def test_a_rank_that_goes_silent_outside_of_steps_is_named(tmp_path):
    first, _ = run(tmp_path, "stop")
    assert first[0] == 2
    assert "rank 1 stalled: no heartbeat for" in first[2]


def test_the_time_limit_of_a_step_holds_within_a_group_that_was_there(tmp_path):
    first, second = run(tmp_path, "nested")
    assert (first[0], second[0]) == (2, 2)
    assert "rank 1 stalled at step 7" in first[2]
    assert "waiting for data" in first[2]
