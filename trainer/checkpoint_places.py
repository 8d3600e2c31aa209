"""Where checkpoints lie: in a folder of a disk that all ranks see, or in one of an object store.

On a disk the ranks write into one temporary folder, which is renamed. A store renames nothing: each rank writes its
files into a folder of its own machine and uploads them, and a checkpoint is whole exactly when its manifest is there,
which is written last. Nothing here is collective; each method says which ranks call it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recpress.data import artifact, storage
from recpress.data.errors import InputError

KIND = "checkpoint"
RUN = "run.json"
"""The numbers of the run: position in the log, schedule, results."""
METRICS = "metrics"
"""Folder of the metrics of a run that is not finished."""
_NAME = re.compile(r"(step|best)-(\d{8,})")


class Damaged(Exception):
    """What lies there is no whole checkpoint; the message says why."""


class Place(ABC):
    """The checkpoints `step-00000100` and `best-00000080` in one folder."""

    metrics: Path
    """Local folder for the metrics of the run; rank 0 writes there."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def at(self, name: str) -> str:
        """How a checkpoint is called in messages: its path or address."""
        return storage.join(self.folder, name)

    # ---- finding

    def steps(self) -> list[str]:
        """Names of all `step-*`, whole or not, by step. Rank 0."""
        return _sorted(self._found(), "step")

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest, and content of `run.json`. Rank 0.

        Raises:
            Damaged: they are not both there and whole.
            InputError: another version of the format; a store that does not answer.
        """
        blob = self._bytes(name, artifact.MANIFEST)
        try:
            manifest = artifact.parse_manifest(blob, self.at(name), KIND)
            for file in manifest["files"]:
                if file.startswith("/") or ".." in file.split("/"):
                    raise Damaged(f"its manifest lists {file!r}, expected names below the folder")
        except artifact.UnknownVersion:
            raise
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(str(error)) from error
        blob = self._bytes(name, RUN)
        try:
            return manifest, json.loads(blob)
        except ValueError as error:
            raise Damaged(f"{RUN}: {error}") from error

    @abstractmethod
    def check(self, name: str, manifest: Mapping[str, Any], world: int) -> None:
        """Compare size and sha256 of this rank's share of the files. Every rank.

        Raises:
            Damaged: a file is missing, or is another one.
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
            except Damaged:
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
        """Content of a small file. Raises Damaged where there is none."""


class LocalPlace(Place):
    """A folder of a disk that all ranks see."""

    def __init__(self, folder: str | Path, rank: int) -> None:
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
            _check(self.path / name / file, manifest["files"][file], self.path / name / file)

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
        names = [path.name for path in self.path.iterdir() if _NAME.fullmatch(path.name)]
        return {name: (self.path / name / artifact.MANIFEST).is_file() for name in names}

    def _bytes(self, name: str, file: str) -> bytes:
        try:
            return (self.path / name / file).read_bytes()
        except OSError as error:
            raise Damaged(f"{self.path / name / file}: {error.strerror}") from error


class RemotePlace(Place):
    """A folder of an object store; `work` is a local folder, of each machine its own.

    A machine fetches all files of a checkpoint once, whatever its ranks need of it.
    """

    def __init__(self, folder: str, rank: int) -> None:
        super().__init__(folder, rank)
        key = hashlib.sha256(folder.encode()).hexdigest()[:16]
        self.work = storage.cache_folder() / f"checkpoints-{key}"
        self.metrics = self.work / METRICS

    def prepare(self) -> None:
        probe = storage.join(self.folder, ".writable")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(probe, b"")
            storage.remove(probe)
        except (OSError, InputError) as error:
            raise InputError(f"{self.folder}: cannot hold checkpoints: {error}") from error

    def check(self, name: str, manifest: Mapping[str, Any], world: int) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return
        wanted, there = manifest["files"], storage.list_files(self.at(name))
        for file, want in sorted(wanted.items()):
            if there.get(file) != want["size"]:
                have = there.get(file, "missing")
                raise Damaged(f"{storage.join(self.at(name), file)}: expected {want['size']} bytes, is {have}")
        folder = self.files(name, manifest)
        with storage.locked(folder):
            for file, want in sorted(wanted.items()):
                _fetch(storage.join(self.at(name), file), folder / file, want)

    def files(self, name: str, manifest: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        return self.work / "fetched" / f"{name}-{key}"

    def begin(self, name: str) -> str:
        self.remove(name)
        return ""

    def staging(self, begun: str) -> Path:
        folder = self.work / f"staging-{self.rank}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.work / "fetched", ignore_errors=True)  # all ranks have loaded what they went on from
        return folder

    def put(self, staging: Path, name: str, files: Iterable[str]) -> None:
        for file in files:
            storage.upload_file(staging / file, storage.join(self.at(name), file))

    def commit(self, staging: Path, name: str, meta: dict[str, Any]) -> None:
        artifact.publish(self.at(name), KIND, meta, [{"name": file, **what} for file, what in meta["files"].items()])

    def end(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    def besides(self, staging: Path) -> list[str]:
        """The metrics until now, so that another machine can go on with them."""
        if not self.metrics.is_dir():
            return []
        shutil.copytree(self.metrics, staging / METRICS)
        return [str(path.relative_to(staging)) for path in sorted((staging / METRICS).rglob("*")) if path.is_file()]

    def restore(self, files: Path | None) -> None:
        shutil.rmtree(self.metrics, ignore_errors=True)
        if files is not None and (files / METRICS).is_dir():
            shutil.copytree(files / METRICS, self.metrics)

    def remove(self, name: str) -> None:
        storage.remove(storage.join(self.at(name), artifact.MANIFEST))  # from here on it is not whole
        storage.remove_folder(self.at(name))

    def remove_all(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self.rank == 0:
            self.clear()

    def forget(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _found(self) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for path in storage.list_files(self.folder):
            name, _, file = path.partition("/")
            if _NAME.fullmatch(name):
                found[name] = found.get(name, False) or file == artifact.MANIFEST
        return found

    def _bytes(self, name: str, file: str) -> bytes:
        try:
            return storage.read_bytes(storage.join(self.at(name), file))
        except FileNotFoundError as error:
            raise Damaged(f"no {file}") from error


def place(folder: str | Path, rank: int) -> Place:
    """Where the checkpoints of `folder`, a path or an address, lie."""
    return RemotePlace(str(folder), rank) if storage.is_remote(folder) else LocalPlace(folder, rank)


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _check(path: Path, want: Mapping[str, Any], shown: object) -> None:
    """Raise Damaged where a local file is not the one that the manifest lists."""
    have = path.stat().st_size if path.is_file() else "missing"
    if have != want["size"]:
        raise Damaged(f"{shown}: expected {want['size']} bytes, is {have}")
    if _sha256(path) != want["sha256"]:
        raise Damaged(f"{shown}: does not have the checksum that its manifest says")


def _fetch(address: str, path: Path, want: Mapping[str, Any]) -> None:
    """Make `path` a copy, and check it. Raises Damaged."""
    for last in (False, True):  # once more: it may have been damaged on its way
        if not path.exists():
            storage.fetch_file(address, path)
        try:
            return _check(path, want, address)
        except Damaged:
            path.unlink()
            if last:
                raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(name: str) -> int:
    return int(name.partition("-")[2])


def _sorted(names: Iterable[str], kind: str) -> list[str]:
    """Those of one kind, by step."""
    return sorted((name for name in names if name.startswith(f"{kind}-")), key=_step)
