"""Storage of checkpoints: the interface of a backend, and the backend for a folder that all ranks see.

On a disk the ranks write into one temporary folder, which is renamed at the end. `remote` has the backend for object
stores. Nothing here is collective; each method says which ranks call it.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recpress.data.dataset import artifact, object_store
from recpress.data.errors import InputError
from recpress.trainer.checkpoint.file_bytes import CHECKSUM, checksum

KIND = "checkpoint"
VERSION = 2
"""Of the format. Version 1 had files of torch.save, and sha256."""
RUN = "run.json"
"""File with the numbers of the run: position in the log, schedule, results."""
METRICS = "metrics"
"""Folder of the metrics of an unfinished run."""
CHECKPOINT_NAME = re.compile(r"(step|best)-(\d{8,})")


class CorruptCheckpoint(Exception):
    """A checkpoint is incomplete or corrupt; the message says why."""


class CheckpointBackend(ABC):
    """The checkpoints `step-00000100` and `best-00000080` in one folder."""

    metrics: Path
    """Local folder for the metrics of the run; rank 0 writes there."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def at(self, name: str) -> str:
        """Path or address of a checkpoint, for messages."""
        return object_store.join(self.folder, name)

    # ---- finding

    def steps(self) -> list[str]:
        """Names of all `step-*`, complete or not, by step. Rank 0."""
        return _sorted(self._found(), "step")

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest, and content of `run.json`. Rank 0.

        Raises:
            CorruptCheckpoint: one of them is missing or corrupt.
            InputError: another version of the format; the store does not answer.
        """
        blob = self._bytes(name, artifact.MANIFEST)
        try:
            manifest = artifact.parse_manifest(blob, self.at(name), KIND, VERSION)
            for file in manifest["files"]:
                if file.startswith("/") or ".." in file.split("/"):
                    raise CorruptCheckpoint(f"its manifest lists {file!r}, expected names below the folder")
        except artifact.UnknownVersion:
            raise
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(str(error)) from error
        blob = self._bytes(name, RUN)
        try:
            return manifest, json.loads(blob)
        except ValueError as error:
            raise CorruptCheckpoint(f"{RUN}: {error}") from error

    @abstractmethod
    def check(self, name: str, manifest: Mapping[str, Any], world: int) -> None:
        """Compare size and checksum of this rank's share of the files. Every rank.

        Raises:
            CorruptCheckpoint: a file is missing or corrupt.
            InputError: the store does not answer.
        """

    @abstractmethod
    def files(self, name: str, manifest: Mapping[str, Any]) -> Path:
        """The local folder of a checkpoint that all ranks have checked. Every rank."""

    # ---- writing

    @abstractmethod
    def prepare(self) -> None:
        """Create the folder. Rank 0. Raises InputError if it cannot hold checkpoints."""

    @abstractmethod
    def begin(self, name: str) -> str:
        """Remove a checkpoint of this name; return the argument of `staging`. Rank 0."""

    @abstractmethod
    def staging(self, begun: str) -> Path:
        """The local folder into which this rank writes. Every rank."""

    @abstractmethod
    def upload(self, staging: Path, name: str, files: Iterable[str]) -> None:
        """Upload this rank's files of the staging folder. Every rank."""

    @abstractmethod
    def commit(self, staging: Path, name: str, meta: dict[str, Any]) -> None:
        """Complete a checkpoint of the uploaded files, which `meta["files"]` lists. Rank 0."""

    @abstractmethod
    def end(self, staging: Path) -> None:
        """Remove the staging folder, after a commit or a failure. Every rank."""

    def extra_files(self, staging: Path) -> list[str]:
        """Copy more files of a `step-*` than state and `run.json` into the staging folder; their names. Rank 0."""
        return []

    def restore(self, files: Path | None) -> None:
        """Restore `metrics` from the checkpoint with these files; empty it without one. Rank 0."""
        if files is None:
            shutil.rmtree(self.metrics, ignore_errors=True)

    # ---- removing

    def prune(self, newest: str, keep: int) -> None:
        """Remove all `step-*` except the last `keep` complete ones up to `newest`, which was just saved. Rank 0.

        Also removes weights of best evaluations that no remaining checkpoint refers to. A checkpoint of a later step
        is corrupt, or this run did not resume from it.
        """
        found = self._found()
        steps = _sorted(found, "step")
        complete = [name for name in steps if found[name] and _step(name) <= _step(newest)]
        for name in steps:
            if name not in complete[-keep:]:
                self.remove(name)
        wanted = set()
        for name in complete[-keep:]:
            try:
                wanted.add(json.loads(self._bytes(name, RUN)).get("best_step"))
            except CorruptCheckpoint:
                continue
        for name in _sorted(found, "best")[:-1]:  # the checkpoint that refers to the newest may not be complete yet
            if _step(name) not in wanted:
                self.remove(name)

    def clear(self) -> None:
        """Remove all checkpoints. Rank 0."""
        for name in self._found():
            self.remove(name)

    @abstractmethod
    def remove(self, name: str) -> None: ...

    @abstractmethod
    def remove_all(self) -> None:
        """Remove the folder, and local copies. Every rank, once no rank needs it."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Remove the folder of a run that saved no checkpoint. Rank 0."""

    @abstractmethod
    def _found(self) -> dict[str, bool]:
        """Name -> whether it has a manifest."""

    @abstractmethod
    def _bytes(self, name: str, file: str) -> bytes:
        """Content of a small file. Raises CorruptCheckpoint if it is missing."""


class LocalBackend(CheckpointBackend):
    """A folder that all ranks see."""

    def __init__(self, folder: str, rank: int) -> None:
        super().__init__(folder, rank)
        self.path = Path(folder)
        self.metrics = self.path / METRICS

    def prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.glob(".*.tmp-*"):  # of killed runs
                shutil.rmtree(path, ignore_errors=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot hold checkpoints: {error.strerror}; expected a writable folder"
            ) from error

    def check(self, name: str, manifest: Mapping[str, Any], world: int) -> None:
        for file in sorted(manifest["files"])[self.rank :: world]:
            check_file(self.path / name / file, manifest["files"][file], self.path / name / file)

    def files(self, name: str, manifest: Mapping[str, Any]) -> Path:
        return self.path / name

    def begin(self, name: str) -> str:
        if (self.path / name).exists():  # corrupt, or of a step that a resumed run repeats
            shutil.rmtree(self.path / name)
        return str(artifact.begin(self.path / name))

    def staging(self, begun: str) -> Path:
        return Path(begun)

    def upload(self, staging: Path, name: str, files: Iterable[str]) -> None:
        pass  # the staging folder is on that disk

    def commit(self, staging: Path, name: str, meta: dict[str, Any]) -> None:
        artifact.commit(staging, self.path / name, KIND, meta)

    def end(self, staging: Path) -> None:
        if self.rank == 0:
            artifact.abort(staging)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_all(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_empty(self) -> None:
        if not self.steps():
            shutil.rmtree(self.path, ignore_errors=True)

    def _found(self) -> dict[str, bool]:
        names = [path.name for path in self.path.iterdir() if CHECKPOINT_NAME.fullmatch(path.name)]
        return {name: (self.path / name / artifact.MANIFEST).is_file() for name in names}

    def _bytes(self, name: str, file: str) -> bytes:
        try:
            return (self.path / name / file).read_bytes()
        except OSError as error:
            raise CorruptCheckpoint(f"{self.path / name / file}: {error.strerror}") from error


def check_file(path: Path, want: Mapping[str, Any], shown: object) -> None:
    """Raise CorruptCheckpoint if a local file is not the one that the manifest lists."""
    have = path.stat().st_size if path.is_file() else "missing"
    if have != want["size"]:
        raise CorruptCheckpoint(f"{shown}: expected {want['size']} bytes, is {have}")
    if checksum(path) != want[CHECKSUM]:
        raise CorruptCheckpoint(f"{shown}: corrupt, its checksum is not that of the manifest")


def _step(name: str) -> int:
    return int(name.partition("-")[2])


def _sorted(names: Iterable[str], kind: str) -> list[str]:
    """The names of one kind, by step."""
    return sorted((name for name in names if name.startswith(f"{kind}-")), key=_step)
