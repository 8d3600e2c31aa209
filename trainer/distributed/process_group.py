"""The process group of a run: one process without a launcher, or the ranks of torchrun; errors on all.

A rank that fails leaves its message in the store that the group was made with. Every other rank watches for
it: it ends with "rank k failed: <message>" when its collective breaks, and by itself where the collective
would hang. Ranks also say where they are (`Heartbeat`): where none moves for too long, all end with the name of the
rank that stalls and its step.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recpress.data.errors import InputError
from recpress.modules.freed import on_freed
from recpress.trainer.allocator import give_back
from recpress.trainer.errors import Preempted, RankFailed

_ERROR, _SEEN, _AT = "recpress/error", "recpress/error-seen", "recpress/at"
POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
"""How often a rank says where it is."""
GRACE_SECONDS = 8.0
"""How long a rank that hangs lives after another's failure, and how long a failed one waits to be heard."""
_MARGIN = 30.0  # the watch, which can name the rank that stalls, comes before the collective's own timeout
_STORE_SECONDS = 10.0  # how long the store may take to answer


@dataclass
class Heartbeat:
    """Where the main thread of this rank is. Outside of `at` and `rest` nothing is expected of it."""

    step: int | None = None
    doing: str = ""
    since: float = 0.0

    def at(self, step: int, doing: str) -> None:
        """At this step, about to do this; the next call is expected within the time that `process_group` was given."""
        self.step, self.doing, self.since = step, doing, time.monotonic()

    def rest(self) -> None:
        """What follows may take any time: an evaluation, saving."""
        self.step = None


WAITING_FOR_DATA = "waiting for data"


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int
    world: int
    device: torch.device
    heart: Heartbeat = field(default_factory=Heartbeat, compare=False)


@contextmanager
def process_group(device: str = "auto", stall_seconds: float = 600.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only rank; leave them at the end.

    Inside another such block (a stage that runs stages) it is that block's group. Models are made in a function that is
    called in the block, so that they are gone at its end. Else DDP's reducer is the last that holds the group, whose
    destructor then runs with the GIL and waits for gloo's threads, of which one may wait for the GIL to let go of a
    tensor: a deadlock, seen once in some 200 runs.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        stall_seconds: how long a step, and a collective outside of steps, may take.

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
    on_freed(give_back)  # the process is this command's
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
        return
    if use_cuda:
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=stall_seconds + _MARGIN)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), place)
    watch = _Watch(ranks, stall_seconds) if ranks.world > 1 else None
    try:
        yield ranks
        if watch:
            dist.barrier()  # a rank that is done waits here, so that it hears of a failure of the others
        gc.collect()  # models in cycles
    except Preempted:  # all ranks stop together
        raise
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
    """Tells the other ranks of a failure here, and this one of theirs; and ends a run in which nobody moves."""

    def __init__(self, ranks: Ranks, stall_seconds: float) -> None:
        self.ranks, self.stall_seconds = ranks, stall_seconds
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: the group's may be blocked in a wait
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._told: str | None = None  # what another rank told
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beats, self._last_beat = 0, 0.0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch-other-ranks", daemon=True)
        self._thread.start()

    def failed(self, error: Exception) -> None:
        """Called with what the block raised: tell the others, or raise what another rank told."""
        if self._told is None:
            message = f"{self.ranks.rank}\n{type(error).__name__}\n{_line(error)}"
            try:
                first = self._store.compare_set(_ERROR, "", message).decode()
                if first != message:
                    self._hear(first)
            except dist.DistError:  # the rank that has the store is gone already, with an error of its own
                return
        if self._told is not None:
            raise RankFailed(self._told) from error
        # The store may live in this process: stay until all have read it.
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(dist.DistError):  # where it lived in another, and is gone, that one has read it
            while self._store.add(_SEEN, 0) < self.ranks.world - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * POLL_SECONDS)

    def _hear(self, message: str) -> None:
        with self._lock:
            if self._told is None:
                rank, kind, text = message.split("\n", 2)
                if kind == _STALLED:
                    self._told = text
                else:
                    self._told = f"rank {rank} failed: {text if kind == 'InputError' else f'{kind}: {text}'}"
                self._store.add(_SEEN, 1)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._beat()
                message = self._store.get(_ERROR).decode() if self._store.check([_ERROR]) else None
            except Exception:  # the store is gone with the launcher or rank 0, or the link to it is
                message = None
                if not self._too_long():
                    continue  # where a process has gone, the collectives will say so
            if message is None and self._too_long():
                message = self._stalled()
            if message is None:
                continue
            if message.startswith(f"{self.ranks.rank}\n") and f"\n{_STALLED}\n" not in message:
                return
            try:
                self._hear(message)
            except Exception:
                self._told = message.split("\n", 2)[2]
            # The main thread's collective breaks when that rank ends, and it raises RankFailed. If it hangs
            # (NCCL, or a rank in another collective), this thread ends the process.
            if f"\n{_STALLED}\n" in message or not self._stop.wait(GRACE_SECONDS):
                print(f"recpress [rank {self.ranks.rank}]: error: {self._told}", file=sys.stderr, flush=True)
                time.sleep(2 * POLL_SECONDS)  # the store may live in this process: let the others read it
                os._exit(2 if f"\n{_STALLED}\n" in message else 1)
            return

    def _beat(self) -> None:
        now, heart = time.monotonic(), self.ranks.heart
        if now - self._last_beat >= BEAT_SECONDS:
            self._beats, self._last_beat = self._beats + 1, now
            self._store.set(f"{_AT}/{self.ranks.rank}", json.dumps([self._beats, heart.step, heart.doing]))

    def _too_long(self) -> bool:
        heart = self.ranks.heart
        return heart.step is not None and time.monotonic() - heart.since > self.stall_seconds

    def _stalled(self) -> str | None:
        """What to tell of a stall; None where this rank has moved meanwhile."""
        heart = self.ranks.heart
        step, seconds = heart.step, round(time.monotonic() - heart.since)
        try:
            before = self._places()
            deadline = time.monotonic() + 2 * BEAT_SECONDS + POLL_SECONDS
            while time.monotonic() < deadline:
                self._beat()
                if self._stop.wait(POLL_SECONDS):
                    return None
            text = _who_stalls(before, self._places(), seconds)
        except Exception:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            text = (
                f"rank {self.ranks.rank} stalled at step {step} for {seconds} s: the store of the run at {where} does "
                "not answer; its node or the link to it is lost"
            )
        if not self._too_long():
            return None
        message = f"{self.ranks.rank}\n{_STALLED}\n{text}"
        try:
            return self._store.compare_set(_ERROR, "", message).decode()  # all say the same
        except Exception:
            return message

    def _places(self) -> list[tuple[int, int | None, str]]:
        """(beats, step, doing) of each rank."""
        keys = [f"{_AT}/{rank}" for rank in range(self.ranks.world)]
        return [tuple(json.loads(self._store.get(k))) if self._store.check([k]) else (0, None, "") for k in keys]


_STALLED = "Stalled"


def _who_stalls(
    before: list[tuple[int, int | None, str]], after: list[tuple[int, int | None, str]], seconds: int
) -> str:
    """Name the rank that the others wait for, from (beats, step, doing) of each rank at two times."""

    def place(rank: int) -> str:
        return f"rank {rank} stalled at step {after[rank][1]}"

    others = max((step for _, step, _ in after if step is not None), default=None)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if old[0] == new[0]:
            return (
                f"rank {rank} stalled: the others wait at step {others} for {seconds} s, it was last heard of at step "
                f"{new[1]}; its process is stopped, or its node or link is down"
            )
    for rank, (_, step, doing) in enumerate(after):
        if step is not None and doing == WAITING_FOR_DATA:
            return f"{place(rank)} for {seconds} s, {doing}"
    at = [(step, rank) for rank, (_, step, _) in enumerate(after) if step is not None]
    low, rank = min(at)
    if low < max(at)[0]:
        return f"{place(rank)} for {seconds} s, {after[rank][2]}"
    return f"all ranks wait for each other at step {low} for {seconds} s: is a link between them lost?"


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


def same_everywhere(**what: str) -> None:
    """Check that all ranks run the same code with the same settings. Collective.

    Args:
        what: name -> value that must be the same on every rank, besides the code.

    Raises:
        InputError: naming what differs and on which ranks. On every rank.
    """
    mine = {"code of recpress": _code(), "torch": str(torch.__version__)} | what
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, value in everyone[0].items():
        others = [rank for rank, of_rank in enumerate(everyone) if of_rank.get(name) != value]
        if others:
            rank = others[0]
            raise InputError(
                f"rank {rank} has another {name} than rank 0 ({everyone[rank].get(name)}, expected {value}); "
                f"differs on {len(others)} of {len(everyone)} ranks: install the same version on every node"
            )


def _code() -> str:
    """Version and a digest of the source of this package."""
    from importlib.metadata import PackageNotFoundError, version

    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for folder in ("data", "modules", "trainer"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    try:
        number = version("recpress")
    except PackageNotFoundError:  # run from source
        number = "source"
    return f"{number} {digest.hexdigest()[:12]}"
