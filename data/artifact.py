"""Artifacts: folders that are whole once they have their final name.

Everything that a stage leaves behind is a folder with a `manifest.json` beside its data. It is written under
a temporary name next to its target, the manifest last, then renamed; so a folder that has its final name is
whole.

One process:

    with writing("out/factors", "factors", meta) as tmp:
        write_files_into(tmp)
        meta["counts"] = {"rows": 10}          # `meta` may grow until the block ends

Several ranks: rank 0 calls `begin` and sends the name to the others, all write their own files into it, and
after a barrier rank 0 calls `commit` (or `abort`, where any rank failed).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs
from recpress.data.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_WHOLE = 1 << 20  # files up to this size are hashed whole
_PIECE = 1 << 18  # of larger ones this much at the head and at the tail: a Parquet footer lies in the tail


def fingerprint(path: str | Path, filesystem: pafs.FileSystem | None = None) -> str:
    """Size and sha256 of a file: whole up to 1 MiB, otherwise its first and last 256 KiB.

    Cheap on any size. It tells files apart that differ in size, in Parquet footer (row counts, statistics,
    compressed sizes) or at either end; a change of the middle that leaves all these alone goes unseen.
    """
    filesystem = filesystem or pafs.LocalFileSystem()
    with filesystem.open_input_file(str(path)) as file:
        size = file.size()
        digest = hashlib.sha256()
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            digest.update(file.read_at(_PIECE, 0))
            digest.update(file.read_at(_PIECE, size - _PIECE))
    return f"{size}-{digest.hexdigest()[:32]}"


def describe_file(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """What a manifest says of one local file: name, size in bytes and fingerprint."""
    return {"name": name or str(path), "size": os.path.getsize(path), "fingerprint": fingerprint(path)}


def describe_folder(path: str | Path) -> list[dict[str, Any]]:
    """`describe_file` of each file of an artifact but its manifest, by name."""
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.is_file() and file != root / MANIFEST)
    return [describe_file(file, str(file.relative_to(root))) for file in files]


def begin(path: str | Path, *, overwrite: bool = False) -> Path:
    """Creates an empty temporary folder beside `path` and returns it.

    Raises InputError where `path` is taken: with `overwrite`, only by something that is not an artifact.
    """
    path = Path(path)
    check_target(path, overwrite)
    tmp = path.absolute().parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        tmp.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot create a folder beside it: {error}") from error
    return tmp


def commit(tmp: Path, path: str | Path, kind: str, meta: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Writes the manifest into `tmp`, makes all of it durable and gives it its final name `path`."""
    path = Path(path)
    manifest = {"format": "recpress", "version": FORMAT_VERSION, "kind": kind, **meta}
    (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1, default=_plain) + "\n", encoding="utf-8")
    for folder, _, names in os.walk(tmp, topdown=False):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)
    check_target(path, overwrite)
    old = None
    if path.exists():
        old = path.absolute().parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
        os.rename(path, old)
    os.rename(tmp, path)
    _sync(path.absolute().parent)
    if old is not None:
        shutil.rmtree(old)
    return path


def abort(tmp: Path) -> None:
    """Removes what `begin` created."""
    shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def writing(
    path: str | Path, kind: str, meta: dict[str, Any] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends, and nothing when it raises.

    Args:
        path: final name of the artifact.
        kind: what it is, as `read_manifest` will ask for it.
        meta: further keys of the manifest, JSON values; read when the block ends, so that the block may add
            to it.
        overwrite: replace an artifact that has this name.
    """
    tmp = begin(path, overwrite=overwrite)
    try:
        yield tmp
        commit(tmp, path, kind, meta or {}, overwrite=overwrite)
    finally:
        abort(tmp)


def read_manifest(path: str | Path, kind: str, *, filesystem: pafs.FileSystem | None = None) -> dict[str, Any]:
    """The manifest of the artifact at `path`.

    Raises InputError where there is none, it cannot be read, or it is of another kind or version.
    """
    filesystem = filesystem or pafs.LocalFileSystem()
    name = f"{path}/{MANIFEST}"
    try:
        with filesystem.open_input_file(name) as file:
            manifest = json.loads(file.read())
    except OSError as error:
        raise InputError(f"{path}: no {MANIFEST}; expected a finished artifact of kind '{kind}'") from error
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "recpress":
        raise InputError(f"{name}: not a manifest of recpress")
    if manifest.get("kind") != kind:
        raise InputError(f"{path}: an artifact of kind '{manifest.get('kind')}'; expected kind '{kind}'")
    if manifest.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {manifest.get('version')}; this release reads version {FORMAT_VERSION}"
        )
    return manifest


def check_target(path: str | Path, overwrite: bool) -> None:
    """Raises InputError where `begin` would: something has this name."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{path}: exists already; choose another name or allow it to be overwritten")
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path}: exists and is no artifact (no {MANIFEST}); it will not be overwritten")


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    """numpy scalars and arrays, and paths, as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a manifest")
