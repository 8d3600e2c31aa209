"""What glibc does with freed host memory. With another C library nothing here has an effect.

Each training step allocates what the step before has freed. By default glibc returns the end of its heap to the system
once 128 KiB to 64 MiB of it are free, and each block above its `mmap` threshold at once. The next step then gets pages
that the kernel has to fill with zeros, which is a quarter to a third of the time of a step on CPU.
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
"""The largest `mmap` threshold that glibc chooses; its trim threshold is then twice as high."""
_MMAPS = 65536
"""glibc's default."""


def malloc_trim() -> None:
    """Return freed memory to the system: glibc keeps MBs of it in the heap of each thread."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class RetainFreedMemory:
    """Within the block the process keeps all memory that it frees, until `malloc_trim`. Then the defaults apply.

    Applies to all threads. Does nothing if the environment sets one of the thresholds (`MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`, or `GLIBC_TUNABLES`).
    """

    def __init__(self, keep: bool = True) -> None:
        self._mallopt = _mallopt() if keep and not _set_by_user(os.environ) else None

    def __enter__(self) -> Self:
        self._set(_MMAP_MAX, 0)
        self._set(_TRIM_THRESHOLD, -1)  # never
        return self

    def __exit__(self, *exc: object) -> None:
        self._defaults()
        malloc_trim()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """glibc's defaults for a while: for large blocks that no step uses, which then return to the system."""
        self._defaults()
        try:
            yield
        finally:
            self.__enter__()

    def _defaults(self) -> None:
        self._set(_MMAP_MAX, _MMAPS)
        self._set(_MMAP_THRESHOLD, _LARGEST)  # any call ends glibc's own adjustment
        self._set(_TRIM_THRESHOLD, 2 * _LARGEST)

    def _set(self, name: int, value: int) -> None:
        if self._mallopt is not None:
            self._mallopt(name, value)


def _set_by_user(environment: Mapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in environment or f"glibc.malloc.{name}" in tunables for name in _NAMES)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    """mallopt(3) of glibc; None with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        return library.mallopt
    return None
