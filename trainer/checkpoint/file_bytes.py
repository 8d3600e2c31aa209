"""Write bytes to a file, with a checksum, at little CPU cost.

Ranks compute on all cores while a checkpoint is written, so CPU time of writing is taken from training. Direct writes
(O_DIRECT) avoid a copy through the page cache. The checksum is computed from memory; nothing is read back. It is XXH3
(128 bits), which runs at the speed of memory. It detects truncated and corrupt files, not deliberate changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "xxh3_128"
"""The algorithm, and the key of a checksum in a manifest."""
PAGE = 4096
"""Alignment of direct writes: address, length and offset in the file."""
_WRITE = 16 << 20
_READ = 1 << 20  # fits in the cache of a core until it is hashed
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def new_checksum() -> Any:
    """An object with `update(bytes)` and `hexdigest()`."""
    return xxhash.xxh3_128()


def write(path: Path, content: memoryview, begun: Any = None, summed: int = 0) -> dict[str, Any]:
    """Write a new file and flush it to the disk; return its entry of a manifest.

    Args:
        content: whole pages at an address that is a multiple of PAGE. Otherwise, and if the filesystem has no direct
            writes (tmpfs, some network filesystems), they go through the page cache.
        begun: checksum of the first `summed` bytes, if it is known; not modified.

    Raises:
        OSError: with the name of the file.
    """
    digest = new_checksum() if begun is None else begun.copy()
    try:
        handle = _open(path)
        try:
            for start in range(0, len(content), _WRITE):
                block = content[start : start + _WRITE]
                digest.update(block[max(0, summed - start) :])
                _write(handle, block)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return {"size": len(content), CHECKSUM: digest.hexdigest()}


def describe(path: Path) -> dict[str, Any]:
    """The entry of a manifest for an existing file."""
    return {"size": path.stat().st_size, CHECKSUM: checksum(path)}


def checksum(path: Path) -> str:
    """Of a whole file."""
    digest, buffer = new_checksum(), memoryview(bytearray(_READ))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write(handle: int, block: memoryview) -> None:
    while block:
        try:
            block = block[os.write(handle, block) :]
        except OSError as error:
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~_DIRECT)
