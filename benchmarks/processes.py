"""Cases in their own processes, on ranks of this machine or of torchrun; and their memory."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from recpress.trainer.allocator import malloc_trim

_PRELOAD = ["recpress.trainer.train.stage", "recpress.trainer.factorize.stage", "recpress.trainer.hash.stage"]
_case = itertools.count(1)
SECONDS = 900.0
"""Timeout of a case."""


def launched() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def in_own_processes(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call `function(*args)` in `ranks` new processes; their results in order of rank.

    The new processes have torch and recpress loaded already, by a fork of one that did nothing else. They have the
    variables of torchrun, so that `process_group` joins them. Under torchrun each process that it started has one
    child, whatever `ranks` says, and gets that one's result alone.

    Raises:
        RuntimeError: one of them failed; the others are ended.
    """
    # A process with threads is not safe to fork, and pyarrow's allocator starts one.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of a setting of ours, on each rank of each case
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    number = next(_case)
    common = {"TORCHELASTIC_USE_AGENT_STORE": "False"}  # each case has its own store
    if launched() > 1:  # at a port that all ranks know
        places = [common | {"MASTER_PORT": str(1024 + (int(os.environ["MASTER_PORT"]) + number) % 60_000)}]
    else:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = []
    for place in places:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(send, place, function, args), daemon=True)
        process.start()
        send.close()
        started.append((process, receive))
    try:
        return [_result(receive) for _, receive in started]
    finally:
        for process, receive in started:
            receive.close()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class PeakMemory:
    """Peak of the resident memory of this process since the start, above what it held then (Linux).

    The peak is the kernel's own, so that no moment is missed. It takes file pages too, as those of a memory map.
    """

    def __init__(self) -> None:
        malloc_trim()  # else it would hide what comes next
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self.start = status_bytes("VmRSS")

    @property
    def bytes(self) -> int:
        return max(0, status_bytes("VmHWM") - self.start)


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, in bytes; 0 if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _child(send: Connection, place: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= place
    try:
        send.send((True, function(*args)))
    except BaseException:
        send.send((False, traceback.format_exc()))


def _result(receive: Connection) -> Any:
    if not receive.poll(SECONDS):
        raise RuntimeError(f"a case took more than {SECONDS:.0f} s")
    try:
        good, result = receive.recv()
    except EOFError:
        raise RuntimeError("a case ended without a result: killed, or out of memory") from None
    if not good:
        raise RuntimeError(f"a case failed:\n{result}")
    return result
