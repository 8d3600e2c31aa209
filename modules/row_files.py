"""Rows of embedding tables in files: .npy, .pt, Parquet, and checkpoints of torch.distributed.checkpoint.

All of them are read in parts, so that a rank that loads its shard of a table never holds the whole table.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from enum import EnumMeta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.modules.row_source import RowSource

RowFile = RowSource | str | Path | tuple[str | Path, str]
"""Rows of a table: a matrix, a path, or (path, key), where the key names a tensor or a column of the file."""

_METADATA = ".metadata"
_CORRUPT = (pickle.UnpicklingError, zipfile.BadZipFile)
_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip
"""Classes that the metadata of a checkpoint may contain, by module."""


def open_rows(rows: RowFile, table: str) -> RowSource:
    """Open the rows of `table`.

    - `.npy`: memory-mapped.
    - `.pt` or `.bin`: a state dict of torch.save, memory-mapped. Only tensors are loaded.
    - `.parquet`, or a folder of them: a list column, one row group at a time in memory. Row k is the vector of id k.
    - a folder of torch.distributed.checkpoint: memory-mapped.

    Without a key, a state dict or checkpoint must have exactly one tensor named `...embedding_bags.<table>.weight` or
    `...embeddings.<table>.weight`, and a Parquet file exactly one list column.

    Raises:
        ValueError: there is no such file, key or column; several tensors fit; the format is unknown or corrupt.
    """
    if not isinstance(rows, str | Path | tuple):
        return rows
    given, key = rows if isinstance(rows, tuple) else (rows, "")
    path = Path(given)
    try:
        if (path / _METADATA).is_file():
            return CheckpointRows(path, key, table)
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix in (".pt", ".bin"):
            state = named_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
            return state[_key(state, key, table, path)]
        if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
            return ParquetRows(path, key, table)
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, AttributeError, *_CORRUPT) as error:
        raise ValueError(f"table {table!r}: {path}: cannot be read: {str(error).splitlines()[0]}") from error
    raise ValueError(
        f"table {table!r}: {path}: {'unknown format' if path.exists() else 'no such file or folder'}; expected .npy, "
        ".pt, .parquet or a folder of torch.distributed.checkpoint"
    )


def named_tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a state dict, also of nested ones: `{"model": {"w": tensor}}` has `model.w`."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
        else:
            found |= named_tensors(value, f"{prefix}{name}.")
    return found


class _Matrix:
    """A matrix on disk: `source[rows]` or `source[rows, columns]` with slices, or with rows as an array of integers."""

    shape: tuple[int, int]

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        first, last, _ = columns.indices(self.shape[1])
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            at = np.arange(start, max(start, stop))
        else:
            at = np.asarray(rows)
        found = torch.empty(len(at), max(0, last - first))
        order = None if len(at) < 2 or bool((at[1:] >= at[:-1]).all()) else np.argsort(at, kind="stable")
        if order is None:
            self._read(at, first, last, found)
            return found
        part = torch.empty_like(found)
        self._read(at[order], first, last, part)
        found[torch.from_numpy(order)] = part
        return found

    def _read(self, rows: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        """Write columns first..last-1 of ascending rows into `out`."""
        raise NotImplementedError


class CheckpointRows(_Matrix):
    """A table in a folder of torch.distributed.checkpoint, whose shards are memory-mapped."""

    def __init__(self, folder: str | Path, key: str = "", table: str = "") -> None:
        folder = Path(folder)
        metadata = _metadata(folder)
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")}
        key = _key(tensors, key, table, folder)
        meta = tensors[key]
        if len(meta.size) != 2 or not meta.properties.dtype.is_floating_point:
            raise ValueError(
                f"table {table!r}: {folder}: {key} is {meta.properties.dtype} of shape {tuple(meta.size)}, expected a "
                "matrix of floats"
            )
        self.shape = (int(meta.size[0]), int(meta.size[1]))
        stored = {tuple(i.offset): s for i, s in metadata.storage_data.items() if i.fqn == key and i.offset is not None}
        self._chunks: list[tuple[int, int, torch.Tensor]] = []
        for chunk in meta.chunks:
            where = tuple(chunk.offsets)
            if where not in stored or getattr(stored[where], "transform_descriptors", None):
                raise ValueError(f"table {table!r}: {folder}: the part of {key} at {where} is missing or compressed")
            mapped = _map_tensor(folder, stored[where], meta.properties.dtype, tuple(chunk.sizes))
            self._chunks.append((*where, mapped))

    def _read(self, rows: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        for row, column, chunk in self._chunks:
            begin, end = np.searchsorted(rows, [row, row + chunk.shape[0]])
            left, right = max(first, column), min(last, column + chunk.shape[1])
            if begin < end and left < right:
                at = rows[begin:end] - row
                whole = at[-1] - at[0] + 1 == len(at)  # a slice reads the pages in order
                part = chunk[int(at[0]) : int(at[-1]) + 1] if whole else chunk[torch.from_numpy(at)]
                out[begin:end, left - first : right - first] = part[:, left - column : right - column].float()


class ParquetRows(_Matrix):
    """A list column of Parquet files, in the order of their names and rows. One row group is in memory at a time."""

    def __init__(self, path: str | Path, column: str = "", table: str = "") -> None:
        import pyarrow.parquet as pq
        import pyarrow.types as kinds

        path = Path(path)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        schema = pq.read_schema(files[0])
        lists = [f.name for f in schema if kinds.is_list(f.type) or kinds.is_large_list(f.type)]
        lists += [f.name for f in schema if kinds.is_fixed_size_list(f.type)]
        if column not in lists and (column or len(lists) != 1):
            raise ValueError(
                f"table {table!r}: {path}: {f'no list column {column!r}' if column else 'expected one list column'}; "
                f"it has {', '.join(lists) or 'none'}"
            )
        self._column, self._name = column or lists[0], f"table {table!r}: {path}: column {column or lists[0]!r}"
        self._groups: list[tuple[Path, int]] = []
        counts = []
        for file in files:
            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                counts.append(metadata.row_group(group).num_rows)
        self._starts = np.cumsum([0, *counts])
        self._group = lru_cache(1)(self._read_group)
        self.shape = (int(self._starts[-1]), self._group(0).shape[1] if self._groups else 0)

    def _read_group(self, index: int) -> np.ndarray:
        import pyarrow.parquet as pq

        file, group = self._groups[index]
        column = pq.ParquetFile(file).read_row_group(group, columns=[self._column]).column(0).combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        width = int(lengths[0]) if len(lengths) else 0
        if column.null_count or (lengths != width).any() or values.dtype.kind != "f":
            raise ValueError(f"{self._name}, row group {group}: expected lists of floats of one length, without nulls")
        return values.reshape(-1, width)

    def _read(self, rows: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        bounds = np.searchsorted(rows, self._starts)
        for group in range(len(self._groups)):
            begin, end = bounds[group], bounds[group + 1]
            if begin < end:
                values = self._group(group)
                if values.shape[1] != self.shape[1]:
                    raise ValueError(
                        f"{self._name}: lists of {values.shape[1]} in {self._groups[group][0].name}, expected "
                        f"{self.shape[1]}"
                    )
                read = values[rows[begin:end] - self._starts[group], first:last]
                out[begin:end] = torch.from_numpy(np.ascontiguousarray(read, np.float32))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_group"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._group = lru_cache(1)(self._read_group)


def _key(keys: Iterable[str], key: str, table: str, path: Path) -> str:
    """The key of a table's weight among those of a state dict."""
    known = list(keys)
    ends = [f"{group}.{table}.weight" for group in ("embedding_bags", "embeddings")]
    fits = [k for k in known if k == key] if key else [k for k in known if any(f".{k}".endswith(f".{e}") for e in ends)]
    if len(fits) == 1:
        return fits[0]
    tables = [
        k for k in known if k.endswith(".weight") and (".embedding_bags." in f".{k}" or ".embeddings." in f".{k}")
    ]
    shown = ", ".join(fits or tables or known)[:400]
    if fits:
        raise ValueError(f"table {table!r}: {path}: several tensors fit: {shown}; pass (path, key)")
    raise ValueError(f"table {table!r}: {path}: no tensor {key or ends[0]!r}; it has {shown or 'none'}")


class _Metadata(pickle.Unpickler):
    """Loads only the classes that the metadata of a checkpoint has."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"the metadata of the checkpoint has the unexpected class {module}.{name}")


def _enum_member(kind: Any, name: str) -> Any:
    """What Python before 3.11.4 pickles as `getattr(kind, name)`."""
    if not isinstance(kind, EnumMeta):
        raise pickle.UnpicklingError(f"the metadata of the checkpoint reads the attribute {name!r} of {kind!r}")
    return kind[name]


def _metadata(folder: Path) -> Any:
    with open(folder / _METADATA, "rb") as file:
        return _Metadata(file).load()


class _Layout(pickle.Unpickler):
    """Offset, shape and strides of a tensor of torch.save. Creates nothing else."""

    def persistent_load(self, pid: Any) -> None:
        return None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda layout, *rest: layout
        return dict


class _Slice(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = open(path, "rb"), offset, length, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        read = self._file.read(size)
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)

    def close(self) -> None:
        self._file.close()
        super().close()


def _map_tensor(folder: Path, stored: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a checkpoint file as a memory map: torch.save stores its values uncompressed in a zip archive."""
    path = folder / stored.relative_path
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{folder}: the metadata names a file outside of the checkpoint, {stored.relative_path}")
    size = dtype.itemsize * int(np.prod(shape))
    with _Slice(path, stored.offset, stored.length) as part, zipfile.ZipFile(part) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[0].endswith("/data")]
        entries = [entry for entry in found if entry.filename.endswith("/0")]
        if len(found) != 1 or not entries or entries[0].compress_type or entries[0].file_size != size:
            raise ValueError(f"{path}: a tensor at byte {stored.offset} is not stored as {size} contiguous bytes")
        offset, sizes, strides = _Layout(io.BytesIO(archive.read(f"{entries[0].filename[:-7]}/data.pkl"))).load()
        if offset or tuple(sizes) != shape or tuple(strides) != (shape[1], 1):
            raise ValueError(f"{path}: a tensor at byte {stored.offset} has strides {strides}, expected {shape[1]}, 1")
        with archive.open(entries[0]):  # checks the entry's own header
            part.seek(entries[0].header_offset + 26)
            name_size, extra_size = np.frombuffer(part.read(4), "<u2")
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    start = stored.offset + entries[0].header_offset + 30 + int(name_size) + int(extra_size)
    raw = np.memmap(path, np.uint8, mode="c", offset=start, shape=(size,))
    return torch.from_numpy(raw).view(dtype).reshape(shape)
