"""Checkpoints of a run: whole or absent, verified before use, the newest whole one found again.

A checkpoint is an artifact, a folder `step-00000100`: what DCP wrote of the tensors (`checkpoint_storage`), `run.json`
with the numbers of the run (position in the log, schedule, metrics), and a manifest, written last, with size and sha256
of every file, the configuration, the versions, and the fingerprints of the log, factors and maps, which are
referred to and not copied. `best-00000080` holds the weights of the best evaluation, where those are kept.

Writing takes place beside training: the state is copied in memory between two steps, and a thread writes the copy, over
a process group of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from recpress.data import artifact
from recpress.data.errors import InputError
from recpress.trainer import checkpoint_storage as storage
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.errors import Preempted
from torch.distributed.checkpoint.api import CheckpointException

KIND = "checkpoint"
RUN = "run.json"
METRICS = "metrics"
"""Folder, beside the checkpoints, of the metrics of a run that is not finished."""
_NAME = re.compile(r"(step|best)-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    run: dict[str, Any]
    """Content of `run.json`."""
    manifest: dict[str, Any]

    def has(self, state: storage.State) -> bool:
        """Whether it has all of these tensors, with these shapes; not collective."""
        kept = storage.names(self.path)
        return all(kept.get(name) == tuple(value.shape) for name, value in state.items())

    def load(self, state: storage.State, group: dist.ProcessGroup | None) -> None:
        """Fill the tensors of `state`. Collective.

        Raises:
            InputError: a tensor is missing or has another shape. On every rank.
        """
        try:
            storage.load(state, self.path, group)
        except CheckpointException as error:
            raise InputError(f"{self.path}: does not fit this run: {_reason(error)}") from error


class Checkpoints:
    """The checkpoints in one folder, which all ranks see. Every method is collective unless it says otherwise.

    Args:
        folder: made where it is missing.
        describe: what a checkpoint says of the run that wrote it, JSON values.
        say: takes warnings, on rank 0.

    A run that goes on finds the newest whole one in `start`. Used in a `with`, which leaves nothing behind where the
    run wrote no checkpoint and ended by an error.

    Raises:
        InputError: the folder cannot be made or written to; what is in it is of another run. On every rank.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: str | Path,
        describe: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.folder, self.describe, self._say = config, Path(folder), dict(describe), say
        self.group = dist.new_group(backend="gloo")
        """Of the writing thread, and of loading."""
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.failures = 0
        self.last: Path | None = None
        """The newest whole one that this run wrote or started from."""
        self._staged = storage.Staged()
        self._writer: threading.Thread | None = None
        self._problem: str | None = None
        self._due = time.monotonic()
        self._on_rank_0(lambda: _prepare(self.folder))
        self.start: Checkpoint | None = None
        """What this run goes on from."""
        if config.resume:
            self.start = self.newest()
            if self.start is not None:
                self._on_rank_0(lambda: check_same_run(self.start, self.describe))
        else:
            self.clear()
        if self.start is None:
            self._on_rank_0(lambda: shutil.rmtree(self.folder / METRICS, ignore_errors=True))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None or isinstance(error, Preempted):
            return
        # Not collective: other ranks may be gone, and so may the checkpoint that is being written.
        if self.rank == 0 and self.last is None and not _listed(self.folder, "step"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Remove the folder: the run is over and its result is whole."""
        self.wait()
        self._on_rank_0(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    # ---- when

    def due(self, step: int) -> bool:
        """Whether the steps say so; not collective, the same on every rank."""
        return bool(self.config.steps) and step % self.config.steps == 0

    def overdue(self) -> bool:
        """Whether the minutes say so; not collective, by the clock of this rank."""
        return bool(self.config.minutes) and time.monotonic() - self._due > 60 * self.config.minutes

    # ---- writing

    def save(self, state: storage.State, run: Mapping[str, Any], step: int, *, best: bool = False) -> None:
        """Copy the state and start to write the copy; waits for the checkpoint before it, if that is not written yet.

        What goes wrong while writing (no space left, say) stops nothing: it is said by the next call, or by `wait`.

        Args:
            run: numbers of the run, JSON values, the same on every rank.
            best: weights of the best evaluation, for `step-*` to refer to.
        """
        self.wait()
        self._due = time.monotonic()
        self._staged.copy(state)
        target = self.folder / f"{'best' if best else 'step'}-{step:08d}"
        self._writer = threading.Thread(
            target=self._write, args=(dict(state), dict(run), target), name="checkpoint", daemon=True
        )
        self._writer.start()
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is written, or could not be, which is said and counted; not collective."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if self._problem is not None:
            self.failures += 1
            if self.rank == 0:
                instead = f"the last whole one is {self.last}" if self.last else "there is none before it"
                self._say(f"warning: a checkpoint was not written: {self._problem}; the run goes on, {instead}")
            self._problem = None

    def _write(self, state: storage.State, run: dict[str, Any], target: Path) -> None:
        tmp: Path | None = None
        try:
            tmp = self._on_rank_0(lambda: _begin(target))
            storage.save(state, self._staged, tmp, self.group)
            files = self._together(lambda: self._describe_own(tmp, run))

            def commit() -> None:
                meta = self.describe | {"files": {name: what for part in files for name, what in part.items()}}
                artifact.commit(tmp, target, KIND, meta)
                self._prune()

            self._on_rank_0(commit)
            self.last = target
        except (Exception, CheckpointException) as error:
            self._problem = f"{target}: {_reason(error)}"
            if tmp is not None and self.rank == 0:
                artifact.abort(tmp)

    def _describe_own(self, tmp: Path, run: dict[str, Any]) -> dict[str, Any]:
        """Size and checksum of the files that this rank wrote."""
        mine = sorted(tmp.glob(f"__{self.rank}_*"))
        if self.rank == 0:
            (tmp / RUN).write_text(json.dumps(run), encoding="utf-8")
            mine += [tmp / storage.TENSORS, tmp / RUN]
        return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in mine}

    def _prune(self) -> None:
        """Remove all but the last `keep`, and the weights of best evaluations that none of them refers to."""
        steps = _listed(self.folder, "step")
        for path in steps[: -self.config.keep]:
            shutil.rmtree(path, ignore_errors=True)
        bests = _listed(self.folder, "best")
        wanted = {best for path in steps[-self.config.keep :] if (best := _best_of(path)) is not None}
        for path in bests[:-1]:  # the newest may be of a step that is not written yet
            if path.name not in wanted:
                shutil.rmtree(path, ignore_errors=True)

    # ---- finding

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning.

        Raises:
            InputError: one of another version of the format. On every rank.
        """
        names = self._on_rank_0(lambda: [path.name for path in _listed(self.folder, "step")])
        for name in reversed(names):
            path = self.folder / name
            found, problem = self._verified(path)
            if found is not None and (best := found.run.get("best_step")) is not None:
                problem = self._verified(self.best_path(best))[1]
            if problem is None:
                self.last = path
                return found
            if self.rank == 0:
                self._say(f"warning: {path} is not whole and is passed over: {problem}")
        return None

    def best_path(self, step: int) -> Path:
        """Where the weights of the best evaluation, of this step, lie."""
        return self.folder / f"best-{step:08d}"

    def best(self, step: int) -> Checkpoint:
        """The weights of the best evaluation, which `newest` has verified."""
        path = self.best_path(step)
        return Checkpoint(path, {}, artifact.read_manifest(path, KIND))

    def _verified(self, path: Path) -> tuple[Checkpoint | None, str | None]:
        """(checkpoint, None), or (None, what is wrong); each rank reads a part of the files."""

        def read() -> tuple[dict[str, Any], dict[str, Any]] | str:
            try:
                manifest = json.loads((path / artifact.MANIFEST).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return f"{path / artifact.MANIFEST}: {_reason(error)}"
            if isinstance(manifest, dict) and manifest.get("version") not in (None, artifact.FORMAT_VERSION):
                artifact.read_manifest(path, KIND)  # raises: not damaged, but of another version
            try:
                artifact.read_manifest(path, KIND)
                run = json.loads((path / RUN).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return _reason(error)
            return manifest, run

        found = self._on_rank_0(read)
        if isinstance(found, str):
            return None, found
        manifest, run = found

        def check() -> str | None:
            for name in sorted(manifest["files"])[self.rank :: self.world]:
                want, file = manifest["files"][name], path / name
                if not file.is_file() or file.stat().st_size != want["size"]:
                    have = file.stat().st_size if file.is_file() else "missing"
                    return f"{file}: expected {want['size']} bytes, is {have}"
                if _sha256(file) != want["sha256"]:
                    return f"{file}: does not have the checksum that its manifest says"
            return None

        problem = next((text for text in self._together(check) if text), None)
        return (None, problem) if problem else (Checkpoint(path, run, manifest), None)

    def clear(self) -> None:
        """Remove all checkpoints, and what killed runs left of unfinished ones."""

        def remove() -> None:
            for path in [*_listed(self.folder, "step"), *_listed(self.folder, "best")]:
                shutil.rmtree(path, ignore_errors=True)

        self._on_rank_0(remove)

    # ---- ranks

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What rank 0 makes, or its InputError, on every rank."""
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

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What each rank makes, or the InputError of the lowest that could not."""
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
        return [made for made, _ in everyone]


ALLOWED = (
    "out",
    "overwrite",
    "device",
    "tensorboard",
    "stop_after",
    "stall_seconds",
    "on_nonfinite",
    "evaluation.patience",
    "stream.threads",
    "stream.on_bad_file",
    "follow.seconds",
    "follow.idle_minutes",
    "data",
    "factors",
    "hash",
)
ALLOWED_SECTIONS = ("checkpoint.", "watch.", "metrics.", "profile.")
"""Keys of the configuration that may change between stop and resume, and whole sections of it. What lies at `data`,
`factors` and `hash` must be the same."""


def check_same_run(found: Checkpoint | None, now: Mapping[str, Any]) -> None:
    """Raise InputError where `found` was written by a run with other settings, another log, factors or maps.

    Args:
        now: `config` (nested, JSON values), and `inputs`: name -> fingerprint, of this run.
    """
    assert found is not None
    made = found.manifest
    before, after = dict(_flat(made["config"])), dict(_flat(json.loads(json.dumps(now["config"]))))
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ALLOWED and not key.startswith(ALLOWED_SECTIONS)
    ]
    if changed:
        each = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed)
        raise InputError(
            f"{found.path}: written with other settings ({each}). When a run goes on, only {', '.join(ALLOWED)} and "
            "checkpoint.*, watch.*, metrics.* and profile.* may change; to start anew: --checkpoint.no-resume"
        )
    for name in sorted(made["inputs"].keys() | now["inputs"].keys()):
        if made["inputs"].get(name) != now["inputs"].get(name):
            raise InputError(
                f"{found.path}: written with another {name}: fingerprint {made['inputs'].get(name)}, now "
                f"{now['inputs'].get(name)}; to start anew: --checkpoint.no-resume"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _prepare(folder: Path) -> None:
    """Make the folder, and remove what killed runs left in it under temporary names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot hold checkpoints: {error.strerror}; expected a writable folder") from error


def _begin(target: Path) -> Path:
    if target.exists():  # a damaged one that was passed over, or one that a resumed run comes to again
        shutil.rmtree(target)
    return artifact.begin(target)


def _listed(folder: Path, kind: str) -> list[Path]:
    """Checkpoints by step."""
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and match[1] == kind:
            found.append((int(match[2]), path))
    return [path for _, path in sorted(found)]


def _best_of(path: Path) -> str | None:
    try:
        step = json.loads((path / RUN).read_text(encoding="utf-8")).get("best_step")
    except (OSError, ValueError):
        return None
    return None if step is None else f"best-{step:08d}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """The first cause, in one line."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
