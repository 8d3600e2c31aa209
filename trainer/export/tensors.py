"""Writes the tensors of programs in blocks: small ones in memory, large ones in files of the export."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO

import torch

from recpress.modules.frozen.kernel import Storage
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.serving.row_index import RowIndex
from recpress.modules.serving.rows import ServedRows, encoded_parts, parts_of
from recpress.modules.serving.tensors import LargeTensors, Stored

FOLDER = "rows"
"""Of the large tensors, in the export."""
Parts = Mapping[str, torch.Tensor]
"""Name -> some rows of each tensor of a table (`rows.parts_of`)."""
Exact = Callable[[torch.Tensor], torch.Tensor]
"""Index (n,) int64 -> rows (n, dim) float32."""


class ProgramTensors:
    """The tensors of one program.

    Args:
        folder: of the export.
        program: name of the program, with which names of files start.
        inline_bytes: tensors with more bytes become files.
    """

    def __init__(self, folder: Path, program: str, inline_bytes: float) -> None:
        self.folder, self.program, self.inline_bytes = folder, program, inline_bytes
        self.large = LargeTensors()
        self.nbytes = 0
        """Of all tensors so far."""
        self.indexes: dict[IdMap, RowIndex] = {}
        """The indexes of the maps so far."""
        self.tables: dict[str, dict[str, int | str]] = {}
        """Storage, rows, dimension and bytes of each table so far."""
        self.exact: dict[ServedRows, Exact] = {}
        """The rows of the model, of each table so far."""

    def add(self, name: str, tensor: torch.Tensor) -> Stored:
        """A tensor that is in memory."""
        writer = _Writer(self, name, tuple(tensor.shape), tensor.dtype)
        writer.append(tensor)
        return writer.end()

    def rows(
        self, name: str, storage: Storage, num_rows: int, dim: int, blocks: Iterable[Parts], exact: Exact
    ) -> ServedRows:
        """Rows of a table in blocks, in order. A row of zeros for unknown ids follows them.

        Args:
            exact: the same rows as the model has them, to measure what the storage loses.
        """
        before = self.nbytes
        writers = {
            part: _Writer(self, f"{name}.{part}", (num_rows + 1, columns), dtype)
            for part, (columns, dtype) in parts_of(storage, dim).items()
        }
        unknown = encoded_parts(torch.zeros(1, dim), storage, name)
        for block in chain(_counted(blocks, name, num_rows), [unknown]):  # a block at a time
            for part, rows in block.items():
                writers[part].append(rows)
        stored = {part: writer.end() for part, writer in writers.items()}
        self.tables[name] = {"storage": storage, "rows": num_rows, "dim": dim, "bytes": self.nbytes - before}
        served = ServedRows(storage, stored, self.large)
        self.exact[served] = exact
        return served


def _counted(blocks: Iterable[Parts], name: str, num_rows: int) -> Iterator[Parts]:
    total = 0
    for block in blocks:
        total += len(next(iter(block.values())))
        yield block
    assert total == num_rows, f"{name}: {total} rows, expected {num_rows}"


class _Writer:
    """One tensor, written in order."""

    def __init__(self, tensors: ProgramTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        size = dtype.itemsize * torch.Size(shape).numel()
        tensors.nbytes += size
        self._name: str | None = None
        if size <= tensors.inline_bytes or not size:
            self._tensor = torch.empty(shape, dtype=dtype)
            self._filled = 0
            return
        safe = re.sub(r"[^\w.-]", "_", name)
        self._name = f"{FOLDER}/{tensors.program}-{len(tensors.large.tensors):02d}-{safe}.bin"
        tensors.large.tensors[self._name] = torch.empty(0)  # the name is taken
        self._path = tensors.folder / self._name
        self._path.parent.mkdir(exist_ok=True)
        self._file: IO[bytes] = open(self._path, "wb", buffering=0)  # noqa: SIM115 (closed by `end`)

    def append(self, rows: torch.Tensor) -> None:
        assert rows.dtype == self._dtype, f"{rows.dtype}, expected {self._dtype}"
        if self._name is None:
            self._tensor[self._filled : self._filled + len(rows)] = rows
            self._filled += len(rows)
        else:
            rest = rows.contiguous().view(-1).view(torch.uint8).numpy().data
            while rest:
                rest = rest[self._file.write(rest) :]

    def end(self) -> Stored:
        if self._name is None:
            return Stored(self._tensor)
        self._file.close()
        numel = torch.Size(self._shape).numel()
        mapped = torch.from_file(str(self._path), shared=False, size=numel, dtype=self._dtype)
        return Stored(mapped.view(self._shape), self._name)
