"""Embeddings of ids from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from recpress.data.dataset.columns import is_list
from recpress.data.dataset.files import first_line
from recpress.data.dataset.object_store import cached_file
from recpress.data.errors import InputError
from recpress.modules.row_files import named_tensors, open_rows
from recpress.modules.row_source import RowSource


def read_embedding(path: str) -> RowSource:
    """A matrix (ids, d): row k is the vector of id k.

    `.npy`: memory-mapped. `.parquet`: one list column, or several float columns, read into memory in the order of the
    rows. `.pt:KEY`: a tensor of a state dict of torch.save; only tensors are loaded. `FOLDER:KEY`: a tensor of a
    checkpoint of torch.distributed.checkpoint, memory-mapped.

    Raises:
        InputError: the file or key does not exist, has another format, or is not a matrix of numbers.
    """
    name, _, key = path.partition(".pt:")
    folder, _, tensor = path.rpartition(":")
    try:
        if folder and (Path(folder) / ".metadata").is_file():
            return open_rows((folder, tensor), tensor)
        if key:
            return _checkpoint(str(cached_file(f"{name}.pt")), key)
        if path.endswith(".npy"):
            return _matrix(path, np.load(cached_file(path), mmap_mode="r", allow_pickle=False))
        if path.endswith(".parquet"):
            return _matrix(path, _parquet(str(cached_file(path))))
    except InputError:
        raise
    except (OSError, ValueError, EOFError, pa.ArrowException, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read as an embedding: {first_line(error)}") from error
    raise InputError(f"{path}: expected FILE.npy, FILE.parquet, FILE.pt:KEY or FOLDER:KEY")


def _checkpoint(path: str, key: str) -> RowSource:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no common type for files that hold more than tensors
        raise InputError(f"{path}: not a file of tensors: {first_line(error)}") from error
    tensors = named_tensors(state)
    if key not in tensors:
        raise InputError(f"{path}: no tensor {key!r}; it has {', '.join(tensors) or 'none'}")
    table = tensors[key]
    if table.ndim != 2 or not table.is_floating_point():
        raise InputError(f"{path}:{key}: {table.dtype} of shape {tuple(table.shape)}, expected a matrix of floats")
    return table


def _parquet(path: str) -> np.ndarray:
    table = pq.read_table(path).combine_chunks()
    if table.num_columns == 1 and is_list(table.schema.field(0).type):
        column = table.column(0).combine_chunks()
        lengths = pc.list_value_length(column)
        odd = pc.fill_null(pc.not_equal(lengths, pc.max(lengths)), True)
        if pc.any(odd).as_py():
            row = pc.index(odd, True).as_py()
            found = "no list" if lengths[row].as_py() is None else f"a list of {lengths[row]}"
            raise InputError(
                f"{path}: column '{table.column_names[0]}', row {row}: {found}; expected lists of the same length, as "
                f"the longest of {pc.max(lengths)}"
            )
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    for field in table.schema:
        if not pa.types.is_floating(field.type):
            raise InputError(f"{path}: column '{field.name}' is {field.type}, expected floats or one list column")
    return np.stack([column.to_numpy() for column in table.columns], 1)


def _matrix(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise InputError(f"{path}: holds {array.dtype} {array.shape}, expected a matrix of floats")
    return array
