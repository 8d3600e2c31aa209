"""What the C library does with host memory that was freed: glibc alone, elsewhere nothing happens.

A training step frees what the next one asks for again. By default glibc gives the end of its heap back to the system
when 128 KiB to 64 MiB of it are free, and each block above its `mmap` threshold at once, so that the next step gets
pages that the kernel has to fill with zeros first: a quarter to a third of a step's time on CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from typing import Self

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_NAMES = ("trim_threshold", "mmap_threshold", "mmap_max")
_LARGEST = 32 << 20
"""Where glibc's own adjusting of the `mmap` threshold ends; that of trimming is then twice as high."""
_MMAPS = 65536
"""glibc's own most."""


def malloc_trim() -> None:
    """Let the C library return to the system what was freed: it keeps MBs of it in each thread's heap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class RetainFreedMemory:
    """Within: what is freed stays with the process, blocks of all sizes, until `malloc_trim`; after: glibc's own ways.

    For the whole process, all its threads. Nothing changes where the environment sets one of the thresholds
    (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`, or `GLIBC_TUNABLES`).
    """

    def __init__(self, keep: bool = True) -> None:
        self._mallopt = _mallopt() if keep and not _set_by_user(os.environ) else None

    def __enter__(self) -> Self:
        self._set(_MMAP_MAX, 0)
        self._set(_TRIM_THRESHOLD, -1)  # never
        return self

    def __exit__(self, *exc: object) -> None:
        self._usual()
        malloc_trim()

    @contextlib.contextmanager
    def usual(self) -> Iterator[None]:
        """glibc's own ways for a while: for large blocks that are not of a step, and go to the system when freed."""
        self._usual()
        try:
            yield
        finally:
            self.__enter__()

    def _usual(self) -> None:
        self._set(_MMAP_MAX, _MMAPS)
        self._set(_MMAP_THRESHOLD, _LARGEST)  # any call ends the adjusting, so where it ends by itself
        self._set(_TRIM_THRESHOLD, 2 * _LARGEST)

    def _set(self, name: int, value: int) -> None:
        if self._mallopt is not None:
            self._mallopt(name, value)


def _set_by_user(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in environment or f"glibc.malloc.{name}" in tunables for name in _NAMES)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    """glibc's mallopt(3); None with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        return library.mallopt
    return None
