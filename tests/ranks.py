"""Run a function on N gloo ranks of this machine, for tests of distributed code."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

multiprocessing.set_forkserver_preload(["recpress.trainer.train.stage", "recpress.trainer.hash.stage"])
"""Ranks are forked from one process that has imported these: each would otherwise take seconds for TorchRec alone."""


def run_on_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call `fn(*args)` on each rank of a new gloo process group, each a new process; return the results by rank.

    fn must be a function at the top of a module (it is pickled by name); inside it, `dist.get_rank()` and
    the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE) are there. Arguments and
    results are pickled.

    Raises:
        Exception: what the first failing rank raised, its traceback as a note; the other ranks are killed.
        TimeoutError: when the ranks do not end within `timeout` seconds; they are killed.
    """
    if world == 1:
        return [_alone(fn, args, timeout)]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        given = (world, folder, fn, args, timeout, dict(os.environ))
        context = mp.start_processes(_entry, given, nprocs=world, join=False, start_method="forkserver")
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__name__} on {world} ranks took more than {timeout} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            errors = [_load(path) for path in Path(folder).glob("error-*")]
            if not errors:
                raise
            _, rank, original, trace = min(errors, key=lambda e: e[0])  # later ones are its consequences
            original.add_note(f"on rank {rank} of {world}:\n{trace}")
            raise original from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [_load(Path(folder) / f"result-{rank}") for rank in range(world)]


def _alone(fn: Callable[..., Any], args: tuple, timeout: float) -> Any:
    """One rank needs no process of its own, and importing TorchRec costs one seconds."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in variables}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ |= variables
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout))
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _entry(
    rank: int,
    world: int,
    folder: str,
    fn: Callable[..., Any],
    args: tuple,
    timeout: float,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        result = fn(*args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    except Exception as error:
        when, trace = time.monotonic(), traceback.format_exc()
        try:
            blob = pickle.dumps((when, rank, error, trace))
        except Exception:  # an exception that cannot be pickled still travels as text
            blob = pickle.dumps((when, rank, RuntimeError(repr(error)), trace))
        partial = Path(folder) / f"partial-{rank}"
        partial.write_bytes(blob)
        partial.rename(Path(folder) / f"error-{rank}")
        raise
    finally:
        dist.destroy_process_group()


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())
