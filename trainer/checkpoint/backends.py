"""Where checkpoints lie: what a place has to do, and a folder of a disk that all ranks see.

On a disk the ranks write into one temporary folder, which is renamed. `checkpoint_remote` has the object stores.
Nothing here is collective; each method says which ranks call it.
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
"""Of the format. 1 had tensors as torch.save writes them, and sha256."""
RUN = "run.json"
"""The numbers of the run: position in the log, schedule, results."""
METRICS = "metrics"
"""Folder of the metrics of a run that is not finished."""
NAME = re.compile(r"(step|best)-(\d{8,})")
"""Of a checkpoint."""


class CorruptCheckpoint(Exception):
    """What lies there is no whole checkpoint; the message says why."""


class CheckpointBackend(ABC):
    """The checkpoints `step-00000100` and `best-00000080` in one folder."""

    metrics: Path
    """Local folder for the metrics of the run; rank 0 writes there."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def at(self, name: str) -> str:
        """How a checkpoint is called in messages: its path or address."""
        return object_store.join(self.folder, name)

    # ---- finding

    def steps(self) -> list[str]:
        """Names of all `step-*`, whole or not, by step. Rank 0."""
        return _sorted(self._found(), "step")

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest, and content of `run.json`. Rank 0.

        Raises:
            CorruptCheckpoint: they are not both there and whole.
            InputError: another version of the format; a store that does not answer.
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
            CorruptCheckpoint: a file is missing, or is another one.
            InputError: a store that does not answer.
        """

    @abstractmethod
    def files(self, name: str, manifest: Mapping[str, Any]) -> Path:
        """The local folder with the files of a checkpoint that all ranks have checked. Every rank."""

    # ---- writing

    @abstractmethod
    def prepare(self) -> None:
        """Make the folder. Rank 0. Raises InputError where it cannot hold checkpoints."""

    @abstractmethod
    def begin(self, name: str) -> str:
        """Clear what has this name; what `staging` is to be given. Rank 0."""

    @abstractmethod
    def staging(self, begun: str) -> Path:
        """The local folder into which this rank writes. Every rank."""

    @abstractmethod
    def put(self, staging: Path, name: str, files: Iterable[str]) -> None:
        """Bring this rank's files of the staging folder to the place. Every rank."""

    @abstractmethod
    def commit(self, staging: Path, name: str, meta: dict[str, Any]) -> None:
        """Make a checkpoint of what the ranks have put; `meta["files"]` lists it. Rank 0."""

    @abstractmethod
    def end(self, staging: Path) -> None:
        """Remove the staging folder, after a commit or a failure. Every rank."""

    def besides(self, staging: Path) -> list[str]:
        """Files that a `step-*` holds besides state and `run.json`; copied into the staging folder. Rank 0."""
        return []

    def restore(self, files: Path | None) -> None:
        """Make `metrics` what it was at the checkpoint with these files; empty without one. Rank 0."""
        if files is None:
            shutil.rmtree(self.metrics, ignore_errors=True)

    # ---- removing

    def prune(self, newest: str, keep: int) -> None:
        """Remove all `step-*` but the last `keep` whole ones up to `newest`, which was just written, and the weights of
        best evaluations that none of them refers to. Rank 0.

        Those of later steps are damaged, or this run has not gone on from them.
        """
        found = self._found()
        steps = _sorted(found, "step")
        whole = [name for name in steps if found[name] and _step(name) <= _step(newest)]
        for name in steps:
            if name not in whole[-keep:]:
                self.remove(name)
        wanted = set()
        for name in whole[-keep:]:
            try:
                wanted.add(json.loads(self._bytes(name, RUN)).get("best_step"))
            except CorruptCheckpoint:
                continue
        for name in _sorted(found, "best")[:-1]:  # the newest may be of a step that is not written yet
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
        """The folder itself, and what is local of it. Every rank, once none of them needs it."""

    @abstractmethod
    def forget(self) -> None:
        """Leave nothing behind of a run that wrote no checkpoint. Rank 0."""

    @abstractmethod
    def _found(self) -> dict[str, bool]:
        """Name -> whether its manifest is there."""

    @abstractmethod
    def _bytes(self, name: str, file: str) -> bytes:
        """Content of a small file. Raises CorruptCheckpoint where there is none."""


class LocalBackend(CheckpointBackend):
    """A folder of a disk that all ranks see."""

    def __init__(self, folder: str, rank: int) -> None:
        super().__init__(folder, rank)
        self.path = Path(folder)
        self.metrics = self.path / METRICS

    def prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.glob(".*.tmp-*"):  # left of killed runs
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
        if (self.path / name).exists():  # a damaged one that was passed over, or one that a resumed run comes to again
            shutil.rmtree(self.path / name)
        return str(artifact.begin(self.path / name))

    def staging(self, begun: str) -> Path:
        return Path(begun)

    def put(self, staging: Path, name: str, files: Iterable[str]) -> None:
        pass  # it is there already

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

    def forget(self) -> None:
        if not self.steps():
            shutil.rmtree(self.path, ignore_errors=True)

    def _found(self) -> dict[str, bool]:
        names = [path.name for path in self.path.iterdir() if NAME.fullmatch(path.name)]
        return {name: (self.path / name / artifact.MANIFEST).is_file() for name in names}

    def _bytes(self, name: str, file: str) -> bytes:
        try:
            return (self.path / name / file).read_bytes()
        except OSError as error:
            raise CorruptCheckpoint(f"{self.path / name / file}: {error.strerror}") from error


def check_file(path: Path, want: Mapping[str, Any], shown: object) -> None:
    """Raise CorruptCheckpoint where a local file is not the one that the manifest lists."""
    have = path.stat().st_size if path.is_file() else "missing"
    if have != want["size"]:
        raise CorruptCheckpoint(f"{shown}: expected {want['size']} bytes, is {have}")
    if checksum(path) != want[CHECKSUM]:
        raise CorruptCheckpoint(f"{shown}: does not have the checksum that its manifest says")


def _step(name: str) -> int:
    return int(name.partition("-")[2])


def _sorted(names: Iterable[str], kind: str) -> list[str]:
    """Those of one kind, by step."""
    return sorted((name for name in names if name.startswith(f"{kind}-")), key=_step)
