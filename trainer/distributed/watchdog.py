"""A thread on each rank that reports failures and stalls to all ranks, through the store of the process group.

- A rank that fails writes its error to the store. Every other rank ends with "rank k failed: ...": its main thread when
  a collective breaks, or this thread if the collective hangs.
- Each rank writes its heartbeat every BEAT_SECONDS. A step that takes longer than `stall_seconds`, or a rank without a
  heartbeat for as long, ends all ranks. The message names the rank that stalled.
- A rank that waits outside of steps for more than a minute prints which ranks it waits for and what they do.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from recpress.trainer.distributed.heartbeat import WAITING_FOR_DATA, heartbeat
from recpress.trainer.errors import PREEMPTED_STATUS, Preempted, RankFailed, report

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
GRACE_SECONDS = 8.0
"""How long a rank that hangs survives another's failure, and how long a failed rank waits until all have read why."""
NO_TIMEOUT = timedelta(days=365)
"""Timeout of collectives. The watchdog ends a run that stalls, because it can name the rank."""
_REPORT_SECONDS = 60.0  # between two messages of a rank that waits
_STORE_SECONDS = 10.0  # timeout of a request to the store
_ERROR, _ERROR_READ, _HEARTBEAT = "recpress/error", "recpress/error-read", "recpress/heartbeat"
_STALLED = "Stalled"  # kind of an error
_STOPPED = "its process is stopped, or its node or link is down"


class _Beat(NamedTuple):
    """The last heartbeat of a rank."""

    number: int
    step: int | None
    activity: str
    seconds: int
    """Duration of the activity so far."""
    waiting: bool
    """For other ranks, outside of steps."""


class _Error(NamedTuple):
    """The first error of the run, as the store holds it."""

    rank: int
    kind: str
    text: str

    @classmethod
    def decode(cls, value: bytes) -> _Error:
        rank, kind, text = value.decode().split("\n", 2)
        return cls(int(rank), kind, text)

    def encode(self) -> str:
        return f"{self.rank}\n{self.kind}\n{self.text}"

    @property
    def message(self) -> str:
        if self.kind in (_STALLED, Preempted.__name__):
            return self.text
        return f"rank {self.rank} failed: {self.text if self.kind == 'InputError' else f'{self.kind}: {self.text}'}"

    @property
    def status(self) -> int:
        """Exit status of a process that this error ends."""
        return {Preempted.__name__: PREEMPTED_STATUS, _STALLED: 2}.get(self.kind, 1)


class Watchdog:
    """Watches the other ranks from `start` until `stop`."""

    def __init__(self, rank: int, world_size: int, stall_seconds: float) -> None:
        self.rank, self.world_size, self.stall_seconds = rank, world_size, stall_seconds
        store: Any = dist.distributed_c10d._get_default_store()
        store.set_timeout(NO_TIMEOUT)  # groups that are made later wait for each rank's address there
        self._store = store.clone()  # a second connection: a wait of the group may block the first
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._error: _Error | None = None  # of another rank
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beats, self._last_beat = 0, 0.0
        self._answered = time.monotonic()  # last answer of the store
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (number of its last beat, when it changed)
        self._last_check = self._last_report = 0.0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def limit(self, stall_seconds: float) -> Iterator[None]:
        """Use another time limit within the block."""
        before, self.stall_seconds = self.stall_seconds, stall_seconds
        try:
            yield
        finally:
            self.stall_seconds = before

    def failed(self, error: Exception) -> None:
        """Report an error of this rank to the others. If another rank failed first, raise its error instead."""
        if self._error is None:
            mine = _Error(self.rank, type(error).__name__, " ".join(str(error).split()))
            try:
                first = _Error.decode(self._store.compare_set(_ERROR, "", mine.encode()))
                if first != mine:
                    self._receive(first)
            except dist.DistError:  # the rank that hosts the store has already ended, with an error of its own
                return
        if self._error is not None:
            kind = Preempted if self._error.kind == Preempted.__name__ else RankFailed
            raise kind(self._error.message) from error
        # The store may be in this process: stay until all ranks have read the error.
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(dist.DistError):  # hosted by another rank, which has read it and ended
            while self._store.add(_ERROR_READ, 0) < self.world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * POLL_SECONDS)

    def _receive(self, error: _Error) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
                self._store.add(_ERROR_READ, 1)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            error = self._poll()
            if error is None:
                continue
            stalled = error.kind == _STALLED
            if error.rank == self.rank and not stalled:
                return
            try:
                self._receive(error)
            except Exception:  # the store does not answer
                self._error = error
            # The main thread's collective breaks when the other rank ends, and raises RankFailed. If it hangs
            # (NCCL, or a rank in another collective), this thread ends the process.
            if stalled or not self._stop.wait(GRACE_SECONDS):
                first = self._error or error
                report(first.message)
                time.sleep(2 * POLL_SECONDS)  # the store may be in this process: let the others read it
                os._exit(first.status)
            return

    def _poll(self) -> _Error | None:
        """Send a heartbeat; return an error of another rank, or a stall."""
        error: _Error | None = None
        try:
            self._beat()
            if self._store.check([_ERROR]):
                error = _Error.decode(self._store.get(_ERROR))
            self._answered = time.monotonic()
            if error is None:
                self._report_waiting()
                error = self._silent_rank()
        except Exception:  # the store ended with the launcher or rank 0, or the link to it is lost
            if not self._step_too_long():
                if time.monotonic() - self._answered < self.stall_seconds:
                    return None  # if a process has ended, the collectives fail soon
                return _Error(self.rank, _STALLED, self._lost_store())
        if error is None and self._step_too_long():
            error = self._stalled_step()
        return error

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._beats, self._last_beat = self._beats + 1, now
            beat = _Beat(
                self._beats,
                heartbeat.step,
                heartbeat.activity,
                round(now - heartbeat.since),
                heartbeat.waiting_since is not None,
            )
            self._store.set(f"{_HEARTBEAT}/{self.rank}", json.dumps(beat))

    def _last_beat_of(self, rank: int) -> _Beat:
        key = f"{_HEARTBEAT}/{rank}"
        return _Beat(*json.loads(self._store.get(key))) if self._store.check([key]) else _Beat(0, None, "", 0, False)

    def _all_beats(self) -> list[_Beat]:
        return [self._last_beat_of(rank) for rank in range(self.world_size)]

    def _silent_rank(self) -> _Error | None:
        """A rank without a heartbeat for too long. Rank 0 watches all others; they watch rank 0."""
        now = time.monotonic()
        if now - self._last_check < BEAT_SECONDS:
            return None
        self._last_check = now
        for rank in range(1, self.world_size) if self.rank == 0 else (0,):
            number = self._last_beat_of(rank).number
            if rank not in self._heard or self._heard[rank][0] != number:
                self._heard[rank] = (number, now)
            elif (seconds := now - self._heard[rank][1]) > self.stall_seconds + 2 * BEAT_SECONDS:
                if self._step_too_long():  # `_stalled_step` names the step too
                    return None
                return self._publish(f"rank {rank} stalled: no heartbeat for {round(seconds)} s; {_STOPPED}")
        return None

    def _report_waiting(self) -> None:
        """Print each minute which ranks the others wait for; only the lowest waiting rank prints."""
        since, now = heartbeat.waiting_since, time.monotonic()
        if since is None or now - max(since, self._last_report) < _REPORT_SECONDS:
            return
        self._last_report = now
        beats = self._all_beats()
        busy = [rank for rank, beat in enumerate(beats) if not beat.waiting]
        if not busy or any(beat.waiting for beat in beats[: self.rank]):
            return
        shown = ", ".join(
            f"rank {rank}: {beats[rank].activity or 'working'}, {_duration(beats[rank].seconds)}" for rank in busy[:3]
        )
        more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
        logger.info("waiting for %s%s", shown, more)

    def _step_too_long(self) -> bool:
        return heartbeat.step is not None and time.monotonic() - heartbeat.since > self.stall_seconds

    def _stalled_step(self) -> _Error | None:
        """The error of a stalled step; None if this rank has moved on meanwhile."""
        step, seconds = heartbeat.step, round(time.monotonic() - heartbeat.since)
        try:
            before = self._all_beats()
            deadline = time.monotonic() + 2 * BEAT_SECONDS + POLL_SECONDS
            while time.monotonic() < deadline:
                self._beat()
                if self._stop.wait(POLL_SECONDS):
                    return None
            text = _name_stalled_rank(before, self._all_beats(), seconds)
        except Exception:
            text = f"rank {self.rank} stalled at step {step} for {seconds} s: {self._lost_store()}"
        return self._publish(text) if self._step_too_long() else None

    def _lost_store(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"the store of the run at {address} does not answer; its node or the link to it is lost"

    def _publish(self, text: str) -> _Error:
        """Write a stall to the store; the error of the first rank that wrote one, so that all print the same."""
        mine = _Error(self.rank, _STALLED, text)
        try:
            return _Error.decode(self._store.compare_set(_ERROR, "", mine.encode()))
        except Exception:
            return mine


def _name_stalled_rank(before: list[_Beat], after: list[_Beat], seconds: int) -> str:
    """Which rank the others wait for, from two heartbeats of each rank, some seconds apart."""

    def stalled(rank: int) -> str:
        return f"rank {rank} stalled at step {after[rank].step} for {seconds} s, {after[rank].activity}"

    in_step = {rank: beat.step for rank, beat in enumerate(after) if beat.step is not None}
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.number == new.number:
            return (
                f"rank {rank} stalled: the others wait at step {max(in_step.values(), default=None)} for {seconds} s, "
                f"its last heartbeat was at step {new.step}; {_STOPPED}"
            )
    for rank in in_step:
        if after[rank].activity == WAITING_FOR_DATA:
            return stalled(rank)
    slowest = min(in_step, key=lambda rank: in_step[rank])
    if in_step[slowest] < max(in_step.values()):
        return stalled(slowest)
    return f"all ranks wait for each other at step {in_step[slowest]} for {seconds} s: is a link between them lost?"


def _duration(seconds: int) -> str:
    return f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
