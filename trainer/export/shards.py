"""Tables of a saved model, read in blocks of rows: no process holds a whole table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from recpress.data.errors import InputError
from recpress.modules.frozen.kernel import QUANTIZED, Storage, decode_rows, row_bytes
from recpress.modules.serving.rows import encoded_parts, parts_of_encoded
from recpress.trainer.export.tensors import Parts
from recpress.trainer.model.weights import Rectangle, shard_files

BLOCK_BYTES = 8 << 20
"""Bytes of a block of rows, as float32."""


class SavedTable:
    """The shards that `weights.save_weights` wrote, of any number of ranks.

    Args:
        folder: of the table.
        storage: of its rows.
        dim: of its rows.

    Raises:
        InputError: a file is missing, corrupt, or of another shape or type.
    """

    def __init__(self, folder: Path, storage: Storage, rows: int, dim: int) -> None:
        self.folder, self.storage, self.rows, self.dim = folder, storage, rows, dim
        self._shards = [_Shard(rectangle, path) for rectangle, path in shard_files(folder)]
        self._width = max(shard.columns[1] for shard in self._shards)
        width = row_bytes(storage, dim) if storage in QUANTIZED else dim
        if self._width != width:
            hint = "; rows of int8 and int4 that are sharded by column cannot be exported" * (storage in QUANTIZED)
            raise InputError(f"{folder}: rows of {self._width} values, expected {width} of {storage} x {dim}{hint}")
        covered = sum(shard.size for shard in self._shards)
        if covered != rows * self._width:
            raise InputError(f"{folder}: holds {covered:,} of the {rows * self._width:,} values of {rows:,} rows")

    def blocks(self, storage: Storage) -> Iterator[Parts]:
        """All rows in order, in a storage."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for first in range(0, self.rows, step):
            stored = self._read(first, min(first + step, self.rows))
            if storage == self.storage:
                yield parts_of_encoded(stored, storage)
            else:
                yield encoded_parts(decode_rows(stored, self.storage), storage, self.folder.name)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows (n,) -> (n, dim) float32, for a few of them; the index `rows`, of unknown ids, has zeros."""
        found = torch.zeros(len(index), self.dim)
        for place, row in enumerate(index.tolist()):
            if row < self.rows:
                found[place] = decode_rows(self._read(row, row + 1), self.storage)[0]
        return found

    def floats(self) -> torch.Tensor:
        """All rows, (rows, dim) float32: of small tables."""
        return decode_rows(self._read(0, self.rows), self.storage)

    def first_column(self) -> torch.Tensor:
        """(rows,) float32."""
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        parts = [
            decode_rows(self._read(first, min(first + step, self.rows)), self.storage)[:, 0].clone()
            for first in range(0, self.rows, step)
        ]
        return torch.cat(parts)

    def _read(self, first: int, last: int) -> torch.Tensor:
        parts = [shard for shard in self._shards if shard.rows[0] < last and first < shard.rows[1]]
        if len(parts) == 1 and parts[0].rows[0] <= first and last <= parts[0].rows[1]:
            return torch.from_numpy(parts[0].read(first, last))
        found = np.empty((last - first, self._width), parts[0].dtype)
        for shard in parts:
            begin, end = max(first, shard.rows[0]), min(last, shard.rows[1])
            found[begin - first : end - first, slice(*shard.columns)] = shard.read(begin, end)
        return torch.from_numpy(found)


class _Shard:
    """One .npy file. It is read, not mapped: pages of a map count as memory of the process."""

    def __init__(self, rectangle: Rectangle, path: Path) -> None:
        self.rows, self.columns = rectangle
        self.path = path
        try:
            with open(path, "rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("unexpected version of the format")
                shape, fortran, self.dtype = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a shard of a table ({error})") from error
        expected = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        if tuple(shape) != expected or fortran:
            raise InputError(f"{path}: holds an array of shape {tuple(shape)}, expected {expected}")
        self.size = expected[0] * expected[1]

    def read(self, first: int, last: int) -> np.ndarray:
        width = self.columns[1] - self.columns[0]
        offset = self._start + (first - self.rows[0]) * width * self.dtype.itemsize
        count = (last - first) * width
        found = np.fromfile(self.path, self.dtype, count, offset=offset)
        if len(found) != count:
            raise InputError(f"{self.path}: ends too early")
        return found.reshape(last - first, width)
