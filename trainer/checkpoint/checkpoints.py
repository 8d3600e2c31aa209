"""Checkpoints of a run: saved atomically in the background, verified before use.

A checkpoint is a folder `step-00000100`:

    tensors-*.bin, tensors.json   the state, cut into parts by DCP (`dcp_storage`)
    run.json                      position in the log, schedule, results
    manifest.json                 written last: size and checksum of each file, configuration, versions, and the
                                  fingerprints of log, factors and id maps, which are not copied

`best-00000080` holds the weights of the best evaluation, if the run keeps them. Checkpoints are on a disk (`backends`)
or on an object store (`remote`).

To save, the training thread copies the state in memory between two steps. A background thread writes the copy, with a
separate process group.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from recpress.data.dataset.object_store import is_remote
from recpress.data.errors import InputError
from recpress.trainer.checkpoint import dcp_storage
from recpress.trainer.checkpoint.backends import RUN, VERSION, CheckpointBackend, CorruptCheckpoint, LocalBackend
from recpress.trainer.checkpoint.file_bytes import describe
from recpress.trainer.checkpoint.remote import ObjectStoreBackend
from recpress.trainer.checkpoint.resume_check import check_resume
from recpress.trainer.checkpoint.staged import Staged, State
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.distributed.watchdog import NO_TIMEOUT
from recpress.trainer.errors import CHECKPOINT_THREAD, Preempted, Signalled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: str
    """Folder or address."""
    files: Path
    """Its folder on this machine."""
    run: dict[str, Any]
    """Content of `run.json`."""
    manifest: dict[str, Any]
    best: Checkpoint | None = None
    """The weights of the best evaluation that it refers to."""

    def has(self, state: State) -> bool:
        """Whether it has all of these tensors, with these shapes. Not collective."""
        kept = dcp_storage.names(self.files)
        return all(kept.get(name) == tuple(value.shape) for name, value in state.items())

    def load(self, state: State, group: dist.ProcessGroup | None) -> None:
        """Fill the tensors of `state`. Collective.

        Raises:
            InputError: a tensor is missing or has another shape. On every rank.
        """
        try:
            dcp_storage.load(state, self.files, group)
        except CheckpointException as error:
            raise InputError(f"{self.path}: does not fit this run: {_reason(error)}") from error


class Checkpoints:
    """The checkpoints in one folder. Every method is collective unless it says otherwise.

    Use it in a `with`. If the run ends by an error before it has saved a checkpoint, the folder is removed.

    Args:
        folder: a path that all ranks see, or the address of an object store; created if it is missing.
        describe: entries of the manifest, JSON values.
        say: takes warnings, on rank 0.

    Raises:
        InputError: the folder cannot be created or written to; it has checkpoints of another run. On every rank.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: str | Path,
        describe: Mapping[str, Any],
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.config, self.describe, self._say = config, dict(describe), say
        self.group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
        """For saving in the background, and for loading."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.backend: CheckpointBackend = (ObjectStoreBackend if is_remote(folder) else LocalBackend)(
            str(folder), self.rank
        )
        self.failures = 0
        self.last: str | None = None
        """The newest `step-*` that this run saved or resumed from."""
        self._staged = Staged()
        self._layouts: dict[frozenset[str], dcp_storage.Layout] = {}
        self._writer: threading.Thread | None = None
        self._problem: str | None = None
        self._due = time.monotonic()
        self._on_rank_0(self.backend.prepare)
        self.start: Checkpoint | None = None
        """The newest complete checkpoint, from which this run resumes; None to start over."""
        if config.resume:
            self.start = found = self.newest()
            if found is not None:
                self._on_rank_0(lambda: check_resume(found.path, found.manifest, self.describe))
        else:
            self._on_rank_0(self.backend.clear)
        self._on_rank_0(lambda: self.backend.restore(self.start.files if self.start else None))

    @property
    def folder(self) -> str:
        """Path or address."""
        return self.backend.folder

    @property
    def metrics(self) -> Path:
        """Local folder of the metrics of an unfinished run."""
        return self.backend.metrics

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.wait()  # ending the process while the thread writes would leave an incomplete checkpoint
            return
        if isinstance(error, Preempted):
            return
        if isinstance(error, Signalled):  # while the model is built, or evaluated and written after the last step
            self.wait()
            if self.last is not None:
                raise Preempted(
                    f"stopped by {error.name}; rerun the same command to resume from {self.last}", alone=True
                ) from None
        # Not collective: other ranks may have ended, and the checkpoint in progress may be lost.
        if self.rank == 0 and self.last is None:
            self.backend.remove_if_empty()

    def finish(self) -> None:
        """Remove the folder after the output of the run is complete."""
        self.wait()
        dist.barrier(group=self.group)
        try:
            self.backend.remove_all()
        except InputError as error:  # of rank 0
            self._say(f"the checkpoints of this run, which is over, could not be removed: {error}")
        dist.barrier(group=self.group)

    # ---- when

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due by steps. Not collective; the same on every rank."""
        return bool(self.config.steps) and step % self.config.steps == 0

    def overdue(self) -> bool:
        """Whether one is due by minutes, on the clock of this rank. Not collective."""
        return bool(self.config.minutes) and time.monotonic() - self._due > 60 * self.config.minutes

    # ---- writing

    def save(self, state: State, run: Mapping[str, Any], step: int, *, best: bool = False) -> None:
        """Copy the state and start to write the copy. First waits until the previous checkpoint is written.

        A failure to write (disk full, store unavailable) does not stop training. The next call, or `wait`, logs it.

        Args:
            run: content of `run.json`, JSON values, the same on every rank.
            best: save weights of the best evaluation, for a `step-*` to refer to.
        """
        self.wait()
        self._due = time.monotonic()
        layout = self._layout(state)
        self._staged.copy(state, layout.ranges)
        name = f"{'best' if best else 'step'}-{step:08d}"
        self._writer = threading.Thread(
            target=self._write, args=(layout, dict(run), name), name=CHECKPOINT_THREAD, daemon=True
        )
        self._writer.start()
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Log and count a failure. Not collective."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if self._problem is not None:
            self.failures += 1
            if self.rank == 0:
                previous = (
                    f"the last complete checkpoint is {self.last}" if self.last else "no checkpoint is complete yet"
                )
                self._say(f"a checkpoint was not written: {self._problem}; training continues, {previous}")
            self._problem = None

    def _layout(self, state: State) -> dcp_storage.Layout:
        """Computed once per kind of state (weights, or all), because shapes do not change."""
        kind = frozenset(state)
        if kind not in self._layouts:
            self._layouts[kind] = dcp_storage.lay_out(state, self.group)
        return self._layouts[kind]

    def _write(self, layout: dcp_storage.Layout, run: dict[str, Any], name: str) -> None:
        tmp: Path | None = None
        try:
            tmp = folder = self.backend.staging(self._on_rank_0(lambda: self.backend.begin(name)))
            parts = self._on_all_ranks(lambda: self._write_files(layout, folder, name, run))
            meta = self.describe | {"version": VERSION, "files": {k: v for part in parts for k, v in part.items()}}
            self._on_rank_0(lambda: self.backend.commit(folder, name, meta))
            if name.startswith("step"):
                self.last = self.backend.at(name)
            if self.rank == 0:
                self._prune(name)
        except Exception as error:
            self._problem = f"{self.backend.at(name)}: {_reason(error)}"
        finally:
            if tmp is not None:
                self.backend.end(tmp)

    def _write_files(self, layout: dcp_storage.Layout, folder: Path, name: str, run: dict[str, Any]) -> dict[str, Any]:
        """Write and upload the files of this rank; return their sizes and checksums."""
        found = dcp_storage.write(layout, self._staged, folder)
        if self.rank == 0:
            (folder / RUN).write_text(json.dumps(run), encoding="utf-8")
            small = [RUN, *(self.backend.extra_files(folder) if name.startswith("step") else [])]
            found |= {file: describe(folder / file) for file in small}
        self.backend.upload(folder, name, found)
        return found

    def _prune(self, name: str) -> None:
        try:
            self.backend.prune(name, self.config.keep)
        except InputError as error:  # of a store; the next checkpoint tries again
            self._say(f"old checkpoints could not be removed: {error}")

    # ---- finding

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; skips incomplete and corrupt ones with a warning.

        Raises:
            InputError: a checkpoint of another version of the format; the store does not answer. On every rank.
        """
        for name in reversed(self._on_rank_0(self.backend.steps)):
            found = self._verified(name)
            if isinstance(found, Checkpoint):
                self.last = found.path
                return found
            if self.rank == 0:
                self._say(f"checkpoint {self.backend.at(name)} is incomplete or corrupt, skipping: {found}")
        return None

    def _verified(self, name: str) -> Checkpoint | str:
        """A checkpoint with the best weights that it refers to, or what is wrong. Each rank checks some files."""
        found = self._on_rank_0(lambda: _or_problem(lambda: self.backend.read(name)))
        if isinstance(found, str):
            return found
        manifest, run = found
        problems = self._on_all_ranks(lambda: _or_problem(lambda: self.backend.check(name, manifest, self.world)))
        for problem in problems:
            if problem is not None:
                return str(problem)
        step = run.get("best_step")
        best = None if step is None else self._verified(f"best-{step:08d}")
        if isinstance(best, str):
            return best
        return Checkpoint(self.backend.at(name), self.backend.files(name, manifest), run, manifest, best)

    # ---- ranks

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """The result of rank 0, or its error as InputError, on every rank."""
        result: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result = [work(), None]
            except (OSError, ValueError) as error:
                result = [None, _reason(error)]
        dist.broadcast_object_list(result, 0, group=self.group)
        if result[1] is not None:
            raise InputError(result[1])
        return result[0]

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """The results of all ranks, or the error of the lowest rank that failed as InputError."""
        mine: tuple[Any, str | None]
        try:
            mine = (work(), None)
        except (OSError, ValueError) as error:
            mine = (None, f"rank {self.rank}: {_reason(error)}")
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self.group)
        for _, problem in everyone:
            if problem is not None:
                raise InputError(problem)
        return [result for result, _ in everyone]


def _or_problem(work: Callable[[], Any]) -> Any:
    """The result of `work`, or the text of its CorruptCheckpoint."""
    try:
        return work()
    except CorruptCheckpoint as error:
        return str(error)


def _reason(error: BaseException) -> str:
    """The first cause, in one line."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
