"""The process group of a run: one process without a launcher, or the ranks of torchrun; errors on all.

A rank that fails leaves its message in the store that the group was made with. Every other rank watches for
it: it ends with "rank k failed: <message>" when its collective breaks, and by itself where the collective
    would hang.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from recpress.data.errors import InputError
from recpress.trainer.errors import RankFailed

_ERROR, _SEEN = "recpress/error", "recpress/error-seen"
POLL_SECONDS = 0.5
GRACE_SECONDS = 8.0
"""How long a rank that hangs lives after another's failure, and how long a failed one waits to be heard."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int
    world: int
    device: torch.device


@contextmanager
def process_group(device: str = "auto", timeout_seconds: float = 600.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only rank; leave them at the end.

    Inside another such block (a stage that runs stages) it is that block's group.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        timeout_seconds: how long a collective may take.

    Raises:
        InputError: no CUDA device although `cuda` was asked for.
        RankFailed: on the other ranks, when one raises inside the block.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, and torch sees no CUDA device; expected cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    _quiet_libraries()
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
        return
    if use_cuda:
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), place)
    watch = _Watch(ranks) if ranks.world > 1 else None
    try:
        yield ranks
        if watch:
            dist.barrier()  # a rank that is done waits here, so that it hears of a failure of the others
    except Exception as error:
        if watch:
            watch.failed(error)
        raise
    finally:
        if watch:
            watch.stop()
        dist.destroy_process_group()


def _quiet_libraries() -> None:
    """Leave out what TorchRec and torch say on every start about their own code, which no user can act on."""
    names = ["torchrec.distributed.planner.types", "torch.fx._symbolic_trace"]
    if not torch.cuda.is_available():  # "has no dist stream": there are no streams
        names.append("torchrec.distributed.train_pipeline.postproc")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*broadcast_buffers.*", ".*reduce_scatter_tensor.*"):
        warnings.filterwarnings("ignore", message=text, category=FutureWarning)


class _Watch:
    """Tells the other ranks of a failure here, and this one of theirs."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: the group's may be blocked in a wait
        self._told: str | None = None  # what another rank told
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-other-ranks", daemon=True)
        self._thread.start()

    def failed(self, error: Exception) -> None:
        """Called with what the block raised: tell the others, or raise what another rank told."""
        if self._told is None:
            message = f"{self.ranks.rank}\n{type(error).__name__}\n{_line(error)}"
            first = self._store.compare_set(_ERROR, "", message).decode()
            if first != message:
                self._hear(first)
        if self._told is not None:
            raise RankFailed(self._told) from error
        # The store may live in this process: stay until all have read it.
        deadline = time.monotonic() + GRACE_SECONDS
        while self._store.add(_SEEN, 0) < self.ranks.world - 1 and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * POLL_SECONDS)

    def _hear(self, message: str) -> None:
        with self._lock:
            if self._told is None:
                rank, kind, text = message.split("\n", 2)
                self._told = f"rank {rank} failed: {text if kind == 'InputError' else f'{kind}: {text}'}"
                self._store.add(_SEEN, 1)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                if not self._store.check([_ERROR]):
                    continue
                message = self._store.get(_ERROR).decode()
                if message.startswith(f"{self.ranks.rank}\n"):
                    return
                self._hear(message)
            except Exception:  # the store is gone with the launcher or rank 0; the collectives will say so
                return
            # The main thread's collective breaks when that rank ends, and it raises RankFailed. If it hangs
            # (NCCL, or a rank in another collective), this thread ends the process.
            if not self._stop.wait(GRACE_SECONDS):
                print(self._told, file=sys.stderr, flush=True)
                os._exit(1)
            return


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def agreed() -> Iterator[None]:
    """A block in which each rank may raise InputError or ValueError alone; after it all raise the same.

    For set-up phases without collectives inside: files, columns, shapes. Collective at its end.

    Raises:
        InputError: the message of the lowest rank that failed.
    """
    problem: str | None = None
    cause: Exception | None = None
    try:
        yield
    except (InputError, ValueError) as error:
        problem, cause = _line(error), error
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise InputError(text) from cause
