"""The process group of a run: one process without a launcher, or the ranks of torchrun; errors on all.

A rank that fails leaves its message in the store that the group was made with. Every other rank watches for
it: it ends with "rank k failed: <message>" when its collective breaks, and by itself where the collective
would hang.

No wait of a healthy run times out: one rank may work alone for hours while the others wait. A run ends by what the
ranks say of themselves (`Heartbeat`), every `BEAT_SECONDS`, in the store: a step that takes too long, or a rank that
has not been heard of for too long, ends all ranks with the name of the rank that stalls. A rank that waits for more
than a minute says for whom, and what that rank does.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.modules.memory_hook import set_memory_hook
from recpress.trainer.allocator import give_back
from recpress.trainer.errors import PREEMPTED_STATUS, Preempted, RankFailed, explain

_ERROR, _SEEN, _AT = "recpress/error", "recpress/error-seen", "recpress/at"
POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
"""How often a rank says where it is."""
GRACE_SECONDS = 8.0
"""How long a rank that hangs lives after another's failure, and how long a failed one waits to be heard."""
NO_TIMEOUT = timedelta(days=365)
"""Of collectives: the watch ends a run that stalls, and names the rank."""
STALL_SECONDS = 600.0
_JOIN_SECONDS = 630.0  # how long a rank waits for the others at the start
_REPORT_SECONDS = 60.0  # how often a rank that waits says for whom
_STORE_SECONDS = 10.0  # how long the store may take to answer


@dataclass
class Heartbeat:
    """Where the main thread of this rank is. A step has a time limit; what is outside of steps has none."""

    step: int | None = None
    doing: str = ""
    since: float = field(default_factory=time.monotonic)
    waits_since: float | None = None
    """Since when this rank has waited for the others, outside of steps."""

    def at(self, step: int, doing: str) -> None:
        """At this step, about to do this; the next call is expected within the time that `process_group` was given."""
        self.step, self.doing, self.since = step, doing, time.monotonic()

    def rest(self) -> None:
        """What follows may take any time: an evaluation, saving."""
        self.step, self.doing, self.since = None, "", time.monotonic()


WAITING_FOR_DATA = "waiting for data"


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int
    world: int
    device: torch.device
    heart: Heartbeat = field(default_factory=Heartbeat, compare=False)


_current: Ranks | None = None  # of the outermost block
_watch: _Watch | None = None  # of its group, where that has several ranks


@contextmanager
def process_group(device: str = "auto", stall_seconds: float | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only rank; leave them at the end.

    Inside another such block (a stage that runs stages) it is that block's group, with this block's time limit.

    Models are made in a function that is
    called in the block, so that they are gone at its end. Else DDP's reducer is the last that holds the group, whose
    destructor then runs with the GIL and waits for gloo's threads, of which one may wait for the GIL to let go of a
    tensor: a deadlock, seen once in some 200 runs.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        stall_seconds: how long a step may take, and how long a rank may be silent; 600, or that of the block outside.

    Raises:
        InputError: no CUDA device although `cuda` was asked for.
        RankFailed: on the other ranks, when one raises inside the block.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, and torch sees no CUDA device; expected cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this node has no CUDA device of its own: there are {torch.cuda.device_count()}; "
            "expected no more processes than devices, or --device cpu"
        )
    place = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    _quiet_libraries()
    global _current, _watch
    set_memory_hook(give_back)  # the process is this command's
    if dist.is_initialized():
        heart = _current.heart if _current is not None else Heartbeat()
        with _watch.limit(stall_seconds) if _watch is not None and stall_seconds is not None else nullcontext():
            yield Ranks(dist.get_rank(), dist.get_world_size(), place, heart)
        return
    if use_cuda:
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=_JOIN_SECONDS)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), place)
    dist.distributed_c10d._set_pg_timeout(NO_TIMEOUT)
    watch = _Watch(ranks, STALL_SECONDS if stall_seconds is None else stall_seconds) if ranks.world > 1 else None
    _current, _watch = ranks, watch
    try:
        yield ranks
        if watch:
            meet()  # a rank that is done waits here, so that it hears of a failure of the others
        gc.collect()  # models in cycles
    except Exception as error:
        if isinstance(error, Preempted) and not error.alone:  # all ranks stop together
            raise
        if watch:
            watch.failed(error)
        raise
    finally:
        _current = _watch = None
        if watch:
            watch.stop()
        dist.destroy_process_group()


@contextmanager
def working(doing: str) -> Iterator[None]:
    """What this rank does while others may wait for it, for their messages: "building maps"."""
    heart = _current.heart if _current is not None else Heartbeat()
    before = heart.doing, heart.since
    heart.doing, heart.since = doing, time.monotonic()
    try:
        yield
    finally:
        heart.doing, heart.since = before


@contextmanager
def waiting() -> Iterator[None]:
    """A collective outside of steps, at which this rank may wait for the others for any time."""
    heart = _current.heart if _current is not None else Heartbeat()
    heart.waits_since = time.monotonic()
    try:
        yield
    finally:
        heart.waits_since = None


def meet() -> None:
    """Wait until all ranks are here, however long that takes. Collective."""
    with waiting():
        dist.barrier()


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
        store.set_timeout(NO_TIMEOUT)  # groups that are made later wait for each rank's address there
        self._store = store.clone()  # a connection of its own: the group's may be blocked in a wait
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._told: str | None = None  # what another rank told
        self._kind = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beats, self._last_beat = 0, 0.0
        self._answered = time.monotonic()  # when the store last did
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (beats, when they last changed)
        self._listened = 0.0
        self._reported = 0.0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch-other-ranks", daemon=True)
        self._thread.start()

    @contextmanager
    def limit(self, stall_seconds: float) -> Iterator[None]:
        """Another time limit within the block."""
        before, self.stall_seconds = self.stall_seconds, stall_seconds
        try:
            yield
        finally:
            self.stall_seconds = before

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
            raise (Preempted if self._kind == Preempted.__name__ else RankFailed)(self._told) from error
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
                self._kind = kind
                if kind in (_STALLED, Preempted.__name__):
                    self._told = text
                else:
                    self._told = f"rank {rank} failed: {text if kind == 'InputError' else f'{kind}: {text}'}"
                self._store.add(_SEEN, 1)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._beat()
                message = self._store.get(_ERROR).decode() if self._store.check([_ERROR]) else None
                self._answered = time.monotonic()
                if message is None:
                    self._report()
                    message = self._silent()
            except Exception:  # the store is gone with the launcher or rank 0, or the link to it is
                message = None
                if not self._too_long():
                    if time.monotonic() - self._answered < self.stall_seconds:
                        continue  # where a process has gone, the collectives will say so
                    message = f"{self.ranks.rank}\n{_STALLED}\n{self._lost_store()}"
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
                preempted = self._kind == Preempted.__name__
                os._exit(PREEMPTED_STATUS if preempted else 2 if f"\n{_STALLED}\n" in message else 1)
            return

    def _beat(self) -> None:
        now, heart = time.monotonic(), self.ranks.heart
        if now - self._last_beat >= BEAT_SECONDS:
            self._beats, self._last_beat = self._beats + 1, now
            place = _Place(
                self._beats, heart.step, heart.doing, round(now - heart.since), heart.waits_since is not None
            )
            self._store.set(f"{_AT}/{self.ranks.rank}", json.dumps(place))

    def _silent(self) -> str | None:
        """What to tell of a rank that has not been heard of for too long. Rank 0 listens to all, the others to it."""
        now = time.monotonic()
        if now - self._listened < BEAT_SECONDS:
            return None
        self._listened = now
        for rank in range(1, self.ranks.world) if self.ranks.rank == 0 else (0,):
            beats = self._place(rank).beats
            if rank not in self._heard or self._heard[rank][0] != beats:
                self._heard[rank] = (beats, now)
            elif (seconds := now - self._heard[rank][1]) > self.stall_seconds + 2 * BEAT_SECONDS:
                if self._too_long():  # this rank waits for it in a step: that message has the step
                    return None
                text = f"rank {rank} stalled: not heard of for {round(seconds)} s; {_STOPPED}"
                return self._tell(f"{self.ranks.rank}\n{_STALLED}\n{text}")
        return None

    def _report(self) -> None:
        """Say for whom the ranks wait, each minute; the lowest rank that waits speaks."""
        since, now = self.ranks.heart.waits_since, time.monotonic()
        if since is None or now - max(since, self._reported) < _REPORT_SECONDS:
            return
        self._reported = now
        places = self._places()
        busy = [rank for rank, place in enumerate(places) if not place.waits]
        if not busy or any(place.waits for place in places[: self.ranks.rank]):
            return
        shown = ", ".join(
            f"rank {rank}: {places[rank].doing or 'working'}, {_minutes(places[rank].seconds)}" for rank in busy[:3]
        )
        more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
        line = f"recpress [rank {self.ranks.rank}]: waiting for {shown}{more}"
        print(line, file=sys.stderr, flush=True)

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
            text = f"rank {self.ranks.rank} stalled at step {step} for {seconds} s: {self._lost_store()}"
        if not self._too_long():
            return None
        return self._tell(f"{self.ranks.rank}\n{_STALLED}\n{text}")

    def _lost_store(self) -> str:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"the store of the run at {where} does not answer; its node or the link to it is lost"

    def _tell(self, message: str) -> str:
        """What the first rank that saw a stall said of it."""
        try:
            return self._store.compare_set(_ERROR, "", message).decode()  # all say the same
        except Exception:
            return message

    def _place(self, rank: int) -> _Place:
        key = f"{_AT}/{rank}"
        return _Place(*json.loads(self._store.get(key))) if self._store.check([key]) else _Place(0, None, "", 0, False)

    def _places(self) -> list[_Place]:
        return [self._place(rank) for rank in range(self.ranks.world)]


class _Place(NamedTuple):
    """What a rank says of itself."""

    beats: int
    step: int | None
    doing: str
    seconds: int
    """For which it has been doing that."""
    waits: bool
    """For other ranks, outside of steps."""


_STALLED = "Stalled"
_STOPPED = "its process is stopped, or its node or link is down"


def _who_stalls(before: list[_Place], after: list[_Place], seconds: int) -> str:
    """Name the rank that the others wait for, from what each rank said at two times."""

    def place(rank: int) -> str:
        return f"rank {rank} stalled at step {after[rank].step}"

    others = max((there.step for there in after if there.step is not None), default=None)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.beats == new.beats:
            return (
                f"rank {rank} stalled: the others wait at step {others} for {seconds} s, it was last heard of at step "
                f"{new.step}; {_STOPPED}"
            )
    for rank, there in enumerate(after):
        if there.step is not None and there.doing == WAITING_FOR_DATA:
            return f"{place(rank)} for {seconds} s, {there.doing}"
    at = [(there.step, rank) for rank, there in enumerate(after) if there.step is not None]
    low, rank = min(at)
    if low < max(at)[0]:
        return f"{place(rank)} for {seconds} s, {after[rank].doing}"
    return f"all ranks wait for each other at step {low} for {seconds} s: is a link between them lost?"


def _minutes(seconds: int) -> str:
    return f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def agreed() -> Iterator[None]:
    """A block in which each rank may raise alone what a user can mend (`errors.explain`); after it all raise the same.

    For phases without collectives inside: files, columns, shapes, work of one rank. Collective at its end, where the
    ranks wait for the slowest, however long that takes.

    Raises:
        InputError: the message of the lowest rank that failed.
    """
    problem: str | None = None
    cause: Exception | None = None
    try:
        yield
    except (RankFailed, Preempted):
        raise
    except Exception as error:
        problem, cause = explain(error), error
        if problem is None:  # a bug: this rank ends with its traceback, and the others by what it leaves in the store
            raise
    problems: list[str | None] = [None] * dist.get_world_size()
    with waiting():
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
