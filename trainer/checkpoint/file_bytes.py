"""Bytes of memory into a file, and their checksum, for as little of a processor's time as can be.

Ranks compute on all cores while a checkpoint is written, so each second that writing computes is taken from training.
Direct writes (O_DIRECT) spare the page cache, a copy, and the pages of the kernel that it would need; the checksum is
made of the memory, and nothing is read back. It is XXH3 of 128 bits, at the speed of memory: it finds what is short,
torn or rotten, and does not guard against somebody who means to deceive.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "xxh3_128"
"""Of the algorithm; the key of a checksum in a manifest."""
PAGE = 4096
"""What a direct write is a multiple of: address, length and place in the file."""
_WRITE = 16 << 20
_READ = 1 << 20  # stays in the cache of a core until it is hashed
_DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux


def new_checksum() -> Any:
    """One that is `update`d with bytes, and has a `hexdigest`."""
    return xxhash.xxh3_128()


def write(path: Path, content: memoryview, begun: Any = None, summed: int = 0) -> dict[str, Any]:
    """Write a new file and bring it to the disk; what a manifest says of it.

    Args:
        content: whole pages at an address that is a multiple of PAGE. Where they are not, or the filesystem knows no
            direct writes (tmpfs, some network filesystems), they take the way through the page cache.
        begun: checksum of the first `summed` bytes, where it has been made; left as it is.

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
    """What a manifest says of a file that is there."""
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
