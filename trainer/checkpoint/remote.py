"""Checkpoints on an object store.

A store has no rename. Each rank writes its files into a local folder and uploads them. The manifest is written last: a
checkpoint is complete if it has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recpress.data.dataset import artifact, object_store
from recpress.data.errors import InputError
from recpress.trainer.checkpoint.backends import (
    CHECKPOINT_NAME,
    KIND,
    METRICS,
    CheckpointBackend,
    CorruptCheckpoint,
    check_file,
)


class ObjectStoreBackend(CheckpointBackend):
    """A folder of an object store. `work` is a local folder of each machine.

    Each machine downloads all files of a checkpoint once.
    """

    def __init__(self, folder: str, rank: int) -> None:
        super().__init__(folder, rank)
        key = hashlib.sha256(folder.encode()).hexdigest()[:16]
        self.work = object_store.cache_folder() / f"checkpoints-{key}"
        self.metrics = self.work / METRICS

    def prepare(self) -> None:
        probe = object_store.join(self.folder, ".writable")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            object_store.write_bytes(probe, b"")
            object_store.remove(probe)
        except (OSError, InputError) as error:
            raise InputError(f"{self.folder}: cannot hold checkpoints: {error}") from error

    def check(self, name: str, manifest: Mapping[str, Any], world: int) -> None:
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            return
        wanted, there = manifest["files"], object_store.list_files(self.at(name))
        for file, want in sorted(wanted.items()):
            if there.get(file) != want["size"]:
                have = there.get(file, "missing")
                raise CorruptCheckpoint(
                    f"{object_store.join(self.at(name), file)}: expected {want['size']} bytes, is {have}"
                )
        folder = self.files(name, manifest)
        with object_store.locked(folder):
            for file, want in sorted(wanted.items()):
                _fetch(object_store.join(self.at(name), file), folder / file, want)

    def files(self, name: str, manifest: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        return self.work / "fetched" / f"{name}-{key}"

    def begin(self, name: str) -> str:
        self.remove(name)
        return ""

    def staging(self, begun: str) -> Path:
        folder = self.work / f"staging-{self.rank}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.work / "fetched", ignore_errors=True)  # all ranks have resumed
        return folder

    def upload(self, staging: Path, name: str, files: Iterable[str]) -> None:
        for file in files:
            object_store.upload_file(staging / file, object_store.join(self.at(name), file))

    def commit(self, staging: Path, name: str, meta: dict[str, Any]) -> None:
        artifact.publish(self.at(name), KIND, meta, [{"name": file, **what} for file, what in meta["files"].items()])

    def end(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    def extra_files(self, staging: Path) -> list[str]:
        """The metrics so far, so that another machine can resume."""
        if not self.metrics.is_dir():
            return []
        shutil.copytree(self.metrics, staging / METRICS)
        return [str(path.relative_to(staging)) for path in sorted((staging / METRICS).rglob("*")) if path.is_file()]

    def restore(self, files: Path | None) -> None:
        shutil.rmtree(self.metrics, ignore_errors=True)
        if files is not None and (files / METRICS).is_dir():
            shutil.copytree(files / METRICS, self.metrics)

    def remove(self, name: str) -> None:
        object_store.remove(object_store.join(self.at(name), artifact.MANIFEST))  # from here on it is incomplete
        object_store.remove_folder(self.at(name))

    def remove_all(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self.rank == 0:
            self.clear()

    def remove_if_empty(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _found(self) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for path in object_store.list_files(self.folder):
            name, _, file = path.partition("/")
            if CHECKPOINT_NAME.fullmatch(name):
                found[name] = found.get(name, False) or file == artifact.MANIFEST
        return found

    def _bytes(self, name: str, file: str) -> bytes:
        try:
            return object_store.read_bytes(object_store.join(self.at(name), file))
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"no {file}") from error


def _fetch(address: str, path: Path, want: Mapping[str, Any]) -> None:
    """Download to `path`, and check it. Raises CorruptCheckpoint."""
    for last in (False, True):  # retry once: the transfer may have corrupted it
        if not path.exists():
            object_store.fetch_file(address, path)
        try:
            return check_file(path, want, address)
        except CorruptCheckpoint:
            path.unlink()
            if last:
                raise
