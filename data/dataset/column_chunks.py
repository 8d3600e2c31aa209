"""The bytes of some columns of one row group, read before they are decoded, so that decoding does no I/O.

Adjacent column chunks are read together, those of a remote file concurrently. `SPENT` separates the time of reading.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

_HOLE = 1 << 18
"""Largest gap, in bytes, between two chunks that one read covers."""
_REQUESTS = 8
"""Concurrent requests to a remote store, of all threads together."""


class Spent(threading.local):
    """What the calling thread has read through `fetch`."""

    bytes = 0
    seconds = 0.0


SPENT = Spent()


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="recpress-requests")


class ColumnChunkFile:
    """A file of which a few ranges are in memory, for `pyarrow.PythonFile`. A read does not copy.

    Args:
        pieces: (offset, bytes), sorted.
        size: bytes of the file.
    """

    closed = False

    def __init__(self, pieces: list[tuple[int, pa.Buffer | bytes]], size: int) -> None:
        self._pieces = [(offset, memoryview(data)) for offset, data in pieces]
        self._size, self._at = size, 0

    def read(self, count: int = -1) -> memoryview:
        for offset, data in self._pieces:
            if offset <= self._at < offset + len(data):
                start = self._at - offset
                found = data[start : start + count] if count >= 0 else data[start:]
                self._at += len(found)
                return found
        raise OSError(f"{count} bytes at {self._at}: outside of the row group's columns")

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None: ...

    def close(self) -> None:
        self._pieces = []
        self.closed = True


def fetch(
    filesystem: pafs.FileSystem, path: str, metadata: pq.FileMetaData, group: int, columns: Sequence[str]
) -> ColumnChunkFile:
    """Read the chunks of the given columns; bytes and seconds are added to `SPENT`. Raises OSError if they cannot be
    read."""
    began = time.perf_counter()
    wanted = chunks(metadata, group, columns)
    with filesystem.open_input_file(path) as source:
        size = source.size()
        if any(end > size for _, end in wanted):
            raise OSError(f"{size} bytes; the footer says at least {max(end for _, end in wanted)}")
        if isinstance(filesystem, pafs.LocalFileSystem) or len(wanted) == 1:
            pieces = []
            for first, end in wanted:
                source.seek(first)
                pieces.append((first, source.read_buffer(end - first)))
        else:
            found = _requests().map(lambda place: source.read_at(place[1] - place[0], place[0]), wanted)
            pieces = [(first, data) for (first, _), data in zip(wanted, found, strict=True)]
    SPENT.bytes += sum(end - first for first, end in wanted)
    SPENT.seconds += time.perf_counter() - began
    return ColumnChunkFile(pieces, size)


def leaves(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    """Ordinals of the leaves of the given top-level columns, sorted.

    The dotted path of a leaf is ambiguous: `item_id.x` may be a column of that name, or part of a struct or list
    `item_id`.
    """
    wanted, place = set(columns), 0
    found: list[int] = []
    for field in metadata.schema.to_arrow_schema():
        count = _num_leaves(field.type)
        if field.name in wanted:
            found += range(place, place + count)
        place += count
    assert place == metadata.num_columns, metadata.schema
    return found


def _num_leaves(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _num_leaves(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _num_leaves(kind.value_type)
    if not pa.types.is_nested(kind):
        return 1
    return sum(_num_leaves(kind.field(place).type) for place in range(kind.num_fields))


def chunks(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Byte ranges [first, end) of the chunks of the given columns, sorted, close ones joined."""
    row_group = metadata.row_group(group)
    found: list[tuple[int, int]] = []
    for place in leaves(metadata, columns):
        chunk = row_group.column(place)
        first = min(x for x in (chunk.dictionary_page_offset, chunk.data_page_offset) if x)
        found.append((first, first + chunk.total_compressed_size))
    joined: list[tuple[int, int]] = []
    for first, end in sorted(found):
        if joined and first - joined[-1][1] <= _HOLE:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined
