"""Artifacts: folders that are complete once they have their final name and a manifest.

The output of a stage is a folder with data and a `manifest.json`. It is written under a temporary name next to its
target, the manifest last, and then renamed; so a folder with its final name is complete.

An object store cannot rename. There an artifact is complete if its manifest exists: the files are written to a local
temporary folder and uploaded, their sizes are checked, and the manifest, which lists them, is uploaded last. A marker
exists in the folder meanwhile, so that a later run recognizes an incomplete upload. Overwriting removes the manifest
first. Files that are memory-mapped are fetched into a local cache (`fetch`) and checked against the manifest.

One process:

    with writing("out/factors", "factors", meta) as tmp:
        write_files_into(tmp)
        meta["counts"] = {"rows": 10}          # `meta` may grow until the block ends

Several ranks: rank 0 calls `begin` and sends the name to the others, all write their own files into it, and
after a barrier rank 0 calls `commit` (or `abort`, if any rank failed). Ranks without a common disk write a remote
artifact from a folder each: rank 0 calls `prepare`, each rank `upload`, and then rank 0 `publish`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from recpress.data.dataset import claim, object_store
from recpress.data.dataset.atomic import replacing
from recpress.data.dataset.claim import hidden
from recpress.data.dataset.files import exists, first_line, is_remote, resolve, retried, shown, split_wild
from recpress.data.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = ".recpress-unfinished"
"""Marks, on an object store, a folder that is being written, or, without a manifest, an incomplete upload."""


_BEGUN: dict[Path, str | Path] = {}
"""Temporary folder -> the target that `begin` claimed for it."""


class UnknownVersion(InputError):
    """An artifact that another release wrote."""


_SMALL = 1 << 20  # files up to this size are hashed completely
_PIECE = 1 << 18  # of larger ones this much at the start and at the end, where a Parquet file has its footer


def fingerprint(path: str | Path, filesystem: pafs.FileSystem | None = None) -> str:
    """Size and sha256 of a file up to 1 MiB; of a larger one, sha256 of its first and last 256 KiB.

    Fast for any size. Files differ in it if they differ in size, in the Parquet footer (row counts, statistics,
    compressed sizes) or at either end. A change in the middle that changes none of these is not detected.
    """
    inner = str(path)
    if filesystem is None:
        filesystem, inner = resolve(path)

    def read() -> str:
        with filesystem.open_input_file(inner) as file:
            size = file.size()
            digest = hashlib.sha256()
            if size <= _SMALL:
                digest.update(file.read())
            else:
                digest.update(file.read_at(_PIECE, 0))
                digest.update(file.read_at(_PIECE, size - _PIECE))
        return f"{size}-{digest.hexdigest()[:32]}"

    return retried(filesystem, shown(filesystem, inner), read)


def describe_folder(path: str | Path) -> list[dict[str, Any]]:
    """`describe_file` of each file of an artifact but its manifest, by name; of a remote one from its manifest."""
    if is_remote(path):
        return list(read_manifest(path)["contents"])
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if file.is_file() and file != root / MANIFEST)
    return [describe_file(file, str(file.relative_to(root))) for file in files]


def describe_file(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Entry of a manifest about one local file: name, size in bytes and fingerprint."""
    return {"name": name or str(path), "size": os.path.getsize(path), "fingerprint": fingerprint(path)}


def begin(
    path: str | Path, *, overwrite: bool = False, kind: str | None = None, inputs: Sequence[str | Path] = ()
) -> Path:
    """Claims `path` (see `claim`), and returns an empty temporary folder, in the same folder if `path` is local.

    `commit` or `abort` with that folder ends the claim.

    Raises:
        InputError: see `check_target`; another run writes to `path`, or it cannot be written.
    """
    check_target(path, overwrite, kind, inputs)
    claim.take(path)
    try:
        if is_remote(path):
            object_store.write_bytes(object_store.join(path, UNFINISHED), b"")  # no permission to write is found now
            tmp = Path(tempfile.mkdtemp(prefix="recpress-"))
        else:
            local = _local(path).absolute()
            tmp = hidden(local, f"tmp-{uuid.uuid4().hex[:8]}")
            try:
                tmp.mkdir(parents=True)
            except OSError as error:
                raise InputError(f"{path}: cannot create a folder next to it: {error.strerror}") from error
    except BaseException:
        claim.release(path)
        raise
    _BEGUN[tmp] = path
    return tmp


def commit(tmp: Path, path: str | Path, kind: str, meta: dict[str, Any], *, overwrite: bool = False) -> None:
    """Writes the manifest into `tmp`, makes all of it durable and gives it its final name `path`."""
    if is_remote(path):
        prepare(path, overwrite=overwrite)
        publish(path, kind, meta, upload(tmp, path))
        _end_claim(tmp)
        return
    path = _local(path)
    (tmp / MANIFEST).write_bytes(_manifest(kind, meta, describe_folder(tmp)))
    for folder, _, names in os.walk(tmp, topdown=False):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)
    check_target(path, overwrite)
    old = None
    if path.exists():
        old = hidden(path.absolute(), f"old-{uuid.uuid4().hex[:8]}")
        os.rename(path, old)
    os.rename(tmp, path)
    _sync(path.absolute().parent)
    if old is not None:
        shutil.rmtree(old)
    _end_claim(tmp)


def prepare(path: str | Path, *, overwrite: bool = False) -> None:
    """Clears a remote target: its manifest first, then the other files."""
    check_target(path, overwrite)
    object_store.write_bytes(object_store.join(path, UNFINISHED), b"")
    object_store.remove(object_store.join(path, MANIFEST))
    object_store.remove_folder(path, keep=[UNFINISHED])


def upload(tmp: Path, path: str | Path, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Uploads the files of `tmp`, or those that are named, and returns their entries of the manifest."""
    contents = [describe_file(tmp / n, n) for n in names] if names is not None else describe_folder(tmp)
    with ThreadPoolExecutor(object_store.THREADS) as pool:
        jobs = [
            pool.submit(object_store.upload_file, tmp / entry["name"], object_store.join(path, entry["name"]))
            for entry in contents
        ]
        for job in jobs:
            job.result()
    return contents


def publish(path: str | Path, kind: str, meta: dict[str, Any], contents: list[dict[str, Any]]) -> None:
    """Writes the manifest of a remote artifact if all of `contents` exists, and nothing else.

    Raises:
        InputError: a file is missing, has another size, or is not in `contents`.
    """
    wanted = {entry["name"]: entry["size"] for entry in contents}
    found = object_store.list_files(path)
    for name in sorted(wanted.keys() | found.keys() - {UNFINISHED}):
        if wanted.get(name) != found.get(name):
            have, want = (f"{sizes[name]} bytes" if name in sizes else "nothing" for sizes in (found, wanted))
            raise InputError(
                f"{object_store.join(path, name)}: {have}, expected {want}; another run may be writing to this folder"
            )
    object_store.write_bytes(object_store.join(path, MANIFEST), _manifest(kind, meta, contents))
    object_store.remove(object_store.join(path, UNFINISHED))


def abort(tmp: Path) -> None:
    """Removes the folder that `begin` created, and ends its claim."""
    shutil.rmtree(tmp, ignore_errors=True)
    _end_claim(tmp)


def _end_claim(tmp: Path) -> None:
    if (path := _BEGUN.pop(tmp, None)) is not None:
        claim.release(path)


@contextmanager
def writing(
    path: str | Path,
    kind: str,
    meta: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends, and nothing when it raises.

    Args:
        path: final name of the artifact.
        kind: of the artifact, which `read_manifest` checks.
        meta: further keys of the manifest, JSON values; read when the block ends, so that the block may add
            to it.
        overwrite: replace an artifact of the same kind that has this name.
        inputs: logs and artifacts that the block reads; `path` must not overlap them.
    """
    tmp = begin(path, overwrite=overwrite, kind=kind, inputs=inputs)
    try:
        yield tmp
        commit(tmp, path, kind, meta or {}, overwrite=overwrite)
    finally:
        abort(tmp)


def read_manifest(
    path: str | Path, kind: str | None = None, *, filesystem: pafs.FileSystem | None = None
) -> dict[str, Any]:
    """The manifest of the artifact at `path`, of any kind by default.

    Raises InputError if there is none, it cannot be read, or it is of another kind or version.
    """
    inner = str(path)
    if filesystem is None:
        filesystem, inner = resolve(path)
    inner, name = f"{inner}/{MANIFEST}", object_store.join(path, MANIFEST)

    def read() -> bytes:
        with filesystem.open_input_file(inner) as file:
            return bytes(file.read())

    try:
        blob = retried(filesystem, name, read)
    except OSError as error:
        remote = not isinstance(filesystem, pafs.LocalFileSystem)
        if remote and not isinstance(error, FileNotFoundError):
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from error
        of_kind = f"a finished artifact of kind '{kind}'" if kind else "a finished artifact"
        raise InputError(f"{path}: no {MANIFEST}; expected {of_kind}") from error
    return parse_manifest(blob, path, kind)


def parse_manifest(
    blob: bytes, path: str | Path, kind: str | None = None, version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """The manifest that `blob` is, of the artifact at `path`. Raises InputError as `read_manifest` does.

    Args:
        version: of the format of this kind, if its writer puts a `version` into `meta`.
    """
    name = object_store.join(path, MANIFEST)
    try:
        manifest = json.loads(blob)
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "recpress":
        raise InputError(f"{name}: not a manifest of recpress")
    if kind is not None and manifest.get("kind") != kind:
        raise InputError(f"{path}: an artifact of kind '{manifest.get('kind')}'; expected kind '{kind}'")
    if manifest.get("version") != version:
        raise UnknownVersion(f"{path}: format version {manifest.get('version')}; this release reads version {version}")
    return manifest


def fetch(path: str | Path, manifest: dict[str, Any], *patterns: str) -> Path:
    """The folder of a local artifact; of a remote one a local copy, with at least the files that match.

    Copies are in `object_store.cache_folder()`, by address and manifest. The processes of one machine share a copy: one
    fetches, the others wait. `*` in a pattern matches `/` too.

    Raises:
        InputError: a file is missing, or differs from the manifest.
    """
    if not is_remote(path):
        return _local(path)
    if "contents" not in manifest:
        raise InputError(f"{object_store.join(path, MANIFEST)}: does not list its files; expected it of this release")
    wanted = [e for e in manifest["contents"] if not patterns or any(fnmatch(e["name"], p) for p in patterns)]
    for entry in wanted:
        check_inside(entry["name"], path)
    key = hashlib.sha256(f"{path} {json.dumps(manifest, sort_keys=True)}".encode()).hexdigest()[:16]
    folder = object_store.cache_folder() / f"artifact-{key}"
    missing = [entry for entry in wanted if not _is_copied(folder, entry)]
    if missing:
        with object_store.locked(folder), ThreadPoolExecutor(object_store.THREADS) as pool:
            jobs = [pool.submit(_copy, path, entry, folder) for entry in missing if not _is_copied(folder, entry)]
            for job in jobs:
                job.result()
    return folder


def check_inside(name: Any, path: str | Path) -> None:
    """Raises InputError if a name that the manifest of `path` lists is not that of a file below its folder."""
    if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{object_store.join(path, MANIFEST)}: lists {name!r}, expected names below the folder")


def check_target(path: str | Path, overwrite: bool, kind: str | None = None, inputs: Sequence[str | Path] = ()) -> None:
    """Raises InputError if nothing can be written to `path`.

    It exists, and `overwrite` is false or it is not an artifact of kind `kind`; one of `inputs` (files, folders or
    globs) is `path`, is in it or contains it; `path` is no name for a folder.
    """
    check_name(path)
    for given in filter(None, map(str, inputs)):
        _check_apart(path, given)
    if is_remote(path):
        found = object_store.list_files(path)
        taken, complete = bool(found.keys() - {UNFINISHED}), MANIFEST in found
        if not complete and UNFINISHED in found:
            return  # remains of an incomplete write
    else:
        path = _local(path)
        taken, complete = path.exists() or path.is_symlink(), (path / MANIFEST).is_file()
    if not taken:
        return
    if not overwrite:
        raise InputError(f"{path}: exists already; choose another name, or replace it with --overwrite")
    if not complete:
        raise InputError(f"{path}: exists and is not an artifact (no {MANIFEST}); it will not be overwritten")
    if kind is not None and (found_kind := read_manifest(path).get("kind")) != kind:
        raise InputError(
            f"{path}: exists and is an artifact of kind '{found_kind}', which one of kind '{kind}' does not overwrite; "
            "choose another name, or remove it"
        )


def check_name(path: str | Path) -> None:
    """Raises InputError if `path` is no name for a new folder."""
    text = str(path)
    if not text.strip():
        raise InputError("the output has an empty name; expected a folder")
    if is_remote(path):
        return
    if re.match(r"\w[\w+.-]+:/[^/]", text) and not os.path.exists(text):
        raise InputError(f"{path}: neither a path nor an address; expected two slashes after the scheme")
    if (text == "~" or text.startswith("~/")) and not os.path.exists(text):
        raise InputError(f"{path}: only shells expand '~'; expected the full path")
    local = os.path.realpath(_local(path))
    try:
        with suppress(FileNotFoundError):
            os.lstat(local)
    except OSError as error:  # a name that is too long, say
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    if os.path.commonpath([local, os.getcwd()]) == local:
        raise InputError(f"{path}: the working folder, or a folder that contains it; expected a name for a new folder")
    for folder in Path(local).parents:
        if _is_artifact(folder):
            raise InputError(f"{path}: is inside the artifact {folder}; expected a folder outside of it")


def _is_artifact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes()).get("format") == "recpress")
    except (OSError, ValueError, AttributeError):
        return False


def _check_apart(path: str | Path, given: str) -> None:
    """Raises InputError if an input is `path`, is in it, or is a folder that contains it."""
    filesystem, target = resolve(path)
    other, source = resolve(given)
    if not filesystem.equals(other):
        return
    if isinstance(filesystem, pafs.LocalFileSystem):
        target, source = os.path.realpath(target), os.path.realpath(source)
    wild = ""
    if not exists(other, source):
        source, wild = split_wild(source)
        if not wild:  # the start of file names (NCF), or absent, which the reader of the input reports
            return
    around = not wild and f"{target}/".startswith(f"{source}/")  # the folder of a glob may contain the target
    if around or f"{source}/".startswith(f"{target}/"):
        where = "is" if source == target else "is in" if around else "contains"
        raise InputError(f"{path}: the output {where} the input {given}; expected a folder outside of it")


def place(path: str | Path) -> str | Path:
    """`path` as a stage returns it: a Path, or a URI."""
    return str(path) if is_remote(path) else _local(path)


def _manifest(kind: str, meta: dict[str, Any], contents: list[dict[str, Any]]) -> bytes:
    manifest = {"format": "recpress", "version": FORMAT_VERSION, "kind": kind, **meta, "contents": contents}
    return (json.dumps(manifest, indent=1, default=_plain) + "\n").encode()


def _is_copied(folder: Path, entry: dict[str, Any]) -> bool:
    return (folder / entry["name"]).is_file() and os.path.getsize(folder / entry["name"]) == entry["size"]


def _copy(path: str | Path, entry: dict[str, Any], folder: Path) -> None:
    """Fetch a file and check its content, atomically."""
    address, target = object_store.join(path, entry["name"]), folder / entry["name"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as arrived:
        for _ in range(2):  # again: it may have been corrupted in transit
            object_store.fetch_file(address, arrived)
            if fingerprint(arrived) == entry["fingerprint"]:
                return
        raise InputError(
            f"{address}: not the file that the manifest lists ({os.path.getsize(arrived)} bytes, expected "
            f"{entry['size']}, or other content): corrupt, or being overwritten"
        )


def _local(path: str | Path) -> Path:
    return Path(resolve(path)[1]) if "://" in str(path) else Path(path)


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
