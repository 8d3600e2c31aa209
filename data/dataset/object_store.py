"""Reads and writes complete files on any filesystem by address, and caches local copies for memory maps.

Operations on remote filesystems are retried after transient failures (`files.retried`); an InputError names the address
if they still fail.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from recpress.data.dataset import files
from recpress.data.dataset.atomic import replacing
from recpress.data.dataset.files import first_line, is_remote, resolve, retried, shown
from recpress.data.errors import InputError

__all__ = [
    "beside",
    "cached_file",
    "fetch_file",
    "is_remote",
    "join",
    "list_files",
    "read_bytes",
    "remove",
    "remove_folder",
    "upload_file",
    "write_bytes",
]

T = TypeVar("T")
PIECE = 32 << 20
"""Bytes that one read fetches, and one write sends."""
THREADS = 8
AHEAD = 4
"""Pieces of an upload in flight; without a limit, pyarrow holds the complete file in memory if the store is slow."""


def join(address: str | Path, name: str) -> str:
    """The address of a file in a folder; options of a URI, and the outer filesystem of a chain (`zip://f::/a.zip`),
    stay at its end."""
    mark = "::" if "::" in str(address) else "?"
    base, mark, options = str(address).partition(mark) if is_remote(address) else (str(address), "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def beside(address: str | Path, suffix: str) -> str:
    """The address with `suffix` at the end of its last name; options of a URI stay at its end."""
    base, mark, options = str(address).partition("?") if is_remote(address) else (str(address), "", "")
    return f"{base.rstrip('/')}{suffix}{mark}{options}"


def read_bytes(address: str | Path) -> bytes:
    """All of a file. Raises FileNotFoundError if there is none, InputError if it cannot be read."""

    def read(filesystem: pafs.FileSystem, path: str) -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())

    return _done(address, "read", read)


def write_bytes(address: str | Path, data: bytes) -> None:
    """Write a file, atomically."""
    if not is_remote(address):
        path = Path(resolve(address)[1])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except (FileExistsError, NotADirectoryError) as error:
            file = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), path.parent)
            raise InputError(f"{address}: cannot be written, because {file} is a file; expected a folder") from error
        except OSError as error:
            raise InputError(f"{address}: cannot be written: {first_line(error)}") from error
        return

    def write(filesystem: pafs.FileSystem, path: str) -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    _done(address, "written", write)


def upload_file(local: str | Path, address: str) -> None:
    """Copy a local file. The object appears when all of it has arrived; then its size is checked."""
    size = os.path.getsize(local)

    def upload(filesystem: pafs.FileSystem, path: str) -> None:
        with open(local, "rb") as source, filesystem.open_output_stream(path) as stream:
            sent = 0
            while piece := source.read(PIECE):
                stream.write(piece)
                sent += 1
                if sent % AHEAD == 0:
                    stream.flush()  # waits for them
        found = filesystem.get_file_info(path)
        if found.size != size:
            raise OSError(f"{found.size} bytes arrived of {size}")

    _done(address, "written", upload)


def fetch_file(address: str, local: str | Path) -> None:
    """Copy a file to `local`, atomically. Each piece is read, and retried, independently."""
    local = Path(local)

    def piece(part: Path, size: int, start: int) -> None:
        def copy(filesystem: pafs.FileSystem, path: str) -> None:
            wanted = min(PIECE, size - start)
            with filesystem.open_input_file(path) as source, open(part, "r+b") as target:
                data = source.read_at(wanted, start)
                if len(data) != wanted:
                    raise OSError(f"{len(data)} of {wanted} bytes at {start}")
                target.seek(start)
                target.write(data)

        _done(address, "read", copy)

    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        size = _info(address).size
        with replacing(local) as part:
            with open(part, "wb") as file:
                file.truncate(size)
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(partial(piece, part, size), range(0, size, PIECE)))
    except OSError as error:
        raise InputError(f"{address}: cannot be copied to {local}: {first_line(error)}") from error


def list_files(address: str | Path) -> dict[str, int]:
    """Name below a folder -> size in bytes, of all files at any depth; empty if the folder is absent."""
    filesystem, path = resolve(address)
    return files.list_files(filesystem, path)


def remove(address: str | Path) -> None:
    """Remove a file, if it exists."""

    def delete(filesystem: pafs.FileSystem, path: str) -> None:
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)

    _done(address, "removed", delete)


def remove_folder(address: str | Path, *, keep: Sequence[str] = ()) -> None:
    """Remove all files below a folder except those named in `keep`."""
    names = [name for name in list_files(address) if name not in keep]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: remove(join(address, name)), names))


def cache_folder() -> Path:
    """The folder of local copies: RECPRESS_CACHE, else `recpress` in the user's cache folder."""
    if named := os.environ.get("RECPRESS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recpress"


def cached_file(address: str) -> Path:
    """The path of a local file; of a remote one a local copy, renewed if the size or time of the file changes."""
    if not is_remote(address):
        return Path(resolve(address)[1])
    info = _info(address)
    key = hashlib.sha256(f"{address} {info.size} {info.mtime_ns}".encode()).hexdigest()[:16]
    local = cache_folder() / f"file-{key}" / info.base_name
    with locked(local.parent):
        if not local.exists():
            fetch_file(address, local)
    return local


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time fills `folder`, so that its ranks fetch a file once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"{folder}: cannot store local copies: {error}; set RECPRESS_CACHE to another folder"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _info(address: str) -> pafs.FileInfo:
    filesystem, path = resolve(address)
    info = files.file_infos(filesystem, [path])[0]
    if info.type != pafs.FileType.File:
        raise InputError(f"{address}: no such file")
    return info


def _done(address: str | Path, what: str, call: Callable[[pafs.FileSystem, str], T]) -> T:
    filesystem, path = resolve(address)
    where = shown(filesystem, path)
    try:
        return retried(filesystem, where, lambda: call(filesystem, path))
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: cannot be {what}: {first_line(error)}") from error
