"""Shuffles tables that do not fit in memory: a uniformly random order of all rows, by buckets on the local disk.

Each row goes to a random bucket; then one bucket after the other is read, shuffled and given out. Since the buckets are
drawn independently and the rows within each are permuted, every order of all rows is equally likely (Rao 1961;
Sandelius 1962).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError
from recpress.data.seeds import generator

MOST_BUCKETS = 512
"""Each is an open file."""


class BucketShuffle:
    """Takes tables of the same columns (`add`), then gives their rows out in a random order (`tables`, once).

    Args:
        folder: for the buckets; made here, and as large as the rows are in Arrow's form, compressed by lz4.
        rows: how many rows will come, about.
        rows_in_memory: rows of a bucket, about; up to five times as many are in memory. With more than 512 times as
            many rows in all, buckets are larger.
        seed: of the order, which depends on the tables and `rows_in_memory` too.
    """

    def __init__(self, folder: Path, rows: int, rows_in_memory: int, seed: int) -> None:
        folder.mkdir()
        number = min(max(1, -(-rows // rows_in_memory)), MOST_BUCKETS)
        self._paths = [folder / f"bucket-{bucket:05d}.arrow" for bucket in range(number)]
        self._writers: list[pa.RecordBatchStreamWriter] = []
        self._rows_in_memory, self._rng = rows_in_memory, generator(seed, "shuffle")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        if self._num_waiting >= self._rows_in_memory:
            self._deal()

    def tables(self) -> Iterator[pa.Table]:
        """The rows of one bucket after the other, each bucket's file removed as it is read."""
        self._deal()
        written = self._paths[: len(self._writers)]  # none where no row came
        self.close()
        for path in written:
            with pa.ipc.open_stream(pa.OSFile(str(path))) as stream:
                table = stream.read_all().combine_chunks()
            os.remove(path)
            table = table.take(pa.array(self._rng.permutation(table.num_rows)))
            yield table

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []

    def _deal(self) -> None:
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        self._waiting, self._num_waiting = [], 0
        table = table.combine_chunks()
        buckets = self._rng.integers(len(self._paths), size=table.num_rows, dtype=np.uint16)
        bounds = np.concatenate(([0], np.cumsum(np.bincount(buckets, minlength=len(self._paths)))))
        table = table.take(pa.array(np.argsort(buckets, kind="stable")))
        try:
            if not self._writers:
                self._open(table.schema)
            for writer, low, high in zip(self._writers, bounds[:-1], bounds[1:], strict=True):
                if low < high:
                    writer.write_table(table.slice(low, high - low))
        except OSError as error:
            raise InputError(f"{self._paths[0].parent}: cannot be written: {first_line(error)}") from error

    def _open(self, schema: pa.Schema) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writers = [pa.ipc.new_stream(pa.OSFile(str(path), "wb"), schema, options=options) for path in self._paths]
