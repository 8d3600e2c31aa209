"""Columns of a log: their types, their checks, and their way from Arrow to numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from recpress.data.errors import InputError

Role = Literal["id", "ids", "label", "time", "categorical", "float"]

_EXPECTED = {
    "id": "integers",
    "ids": "lists of integers",
    "label": "numbers or booleans",
    "time": "integers, floats, timestamps or dates",
    "categorical": "integers, or lists of integers",
    "float": "numbers",
}


@dataclass(frozen=True)
class Column:
    """A column that may be read: what it means, and for ids how many there are."""

    name: str
    role: Role
    limit: int | None = None
    """Ids must be smaller than this; None where it is not known."""


class Jagged(NamedTuple):
    """A list column: row k holds values[offsets[k] : offsets[k + 1]]."""

    values: np.ndarray
    offsets: np.ndarray  # (rows + 1,) int64

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Jagged:
        """The given rows, in the given order."""
        starts, lengths = self.offsets[:-1][rows], self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Jagged(self.values[places], offsets)


def take(column: np.ndarray | Jagged, rows: np.ndarray) -> np.ndarray | Jagged:
    return column.take(rows) if isinstance(column, Jagged) else column[rows]


def check_type(column: Column, schema: pa.Schema, where: str) -> None:
    """Raises InputError where the column is missing or of a type that its role does not allow."""
    found = schema.get_field_index(column.name)
    if found < 0:
        names = ", ".join(schema.names)
        raise InputError(f"{where}: no column '{column.name}'; expected {_EXPECTED[column.role]}, found {names}")
    kind = schema.field(found).type
    if not _fits(column.role, kind):
        raise InputError(f"{where}, column '{column.name}': type {kind}; expected {_EXPECTED[column.role]}")


def _fits(role: Role, kind: pa.DataType) -> bool:
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    ids = _is_list(kind) and pa.types.is_integer(kind.value_type)
    match role:
        case "id":
            return pa.types.is_integer(kind)
        case "ids":
            return ids
        case "categorical":
            return ids or pa.types.is_integer(kind)
        case "time":
            return number or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        case "label":
            return number or pa.types.is_boolean(kind)
        case "float":
            return number


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def check_ids(ids: np.ndarray, limit: int | None, where: str, row_of: Callable[[int], int] | None = None) -> None:
    """Raises InputError, naming the first such row, where an id is negative or not below `limit`.

    Two passes over the array (about 1 ns an id); `where` is file, row group and column. `row_of` tells the
    row of a place in the array, where they differ.
    """
    if ids.size == 0:
        return
    if int(ids.min()) < 0:
        place, fault = int(np.argmax(ids < 0)), "; expected ids from 0"
    elif limit is not None and int(ids.max()) >= limit:
        place, fault = int(np.argmax(ids >= limit)), f" is outside the vocabulary of {limit} ids"
    else:
        return
    raise InputError(f"{where}, row {row_of(place) if row_of else place}: id {ids[place]}{fault}")


def decode(column: Column, data: pa.ChunkedArray, where: str) -> np.ndarray | Jagged:
    """Checks a column of one row group and returns it as numpy, without a copy where Arrow allows.

    Ids and categories come as int64, times as int64 (timestamps in their own unit) or float64, labels and
    floats as float32. A missing float is NaN. Lists come as Jagged; a missing list of categories is an empty
    one.

    Raises:
        InputError: a null where there may be none, an id that is negative or too large, NaN in a label, a row
            without negatives.
    """
    where = f"{where}, column '{column.name}'"
    array = data.combine_chunks() if data.num_chunks != 1 else data.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # no chunks at all
        array = pa.array([], data.type)
    if _is_list(array.type):
        return _decode_lists(column, array, where)
    if array.null_count and column.role != "float":
        row = int(np.argmax(pc.is_null(array).to_numpy(zero_copy_only=False)))
        raise InputError(f"{where}, row {row}: null; expected {_EXPECTED[column.role]}")
    if column.role in ("id", "categorical"):
        return _integers(array, column.limit, where)
    if column.role == "time":
        if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
            times = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
            if np.isnan(times).any():
                raise InputError(f"{where}, row {int(np.argmax(np.isnan(times)))}: NaN; expected a time")
            return times
        if pa.types.is_date(array.type):
            array = array.cast(pa.timestamp("s"))
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    kind = pa.float32()
    values = array.cast(kind, safe=False).to_numpy(zero_copy_only=False)
    if column.role == "label" and np.isnan(values).any():
        raise InputError(f"{where}, row {int(np.argmax(np.isnan(values)))}: NaN; expected a number")
    return values


def _decode_lists(column: Column, array: pa.Array, where: str) -> Jagged:
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if column.role == "ids" and len(lengths) and lengths.min() == 0:
        row = int(np.argmax(lengths == 0))
        raise InputError(f"{where}, row {row}: an empty list; expected at least one item")
    flat = array.flatten()

    def row_of(place: int) -> int:
        return int(np.searchsorted(offsets, place, side="right")) - 1

    if flat.null_count:
        row = row_of(int(np.argmax(pc.is_null(flat).to_numpy(zero_copy_only=False))))
        raise InputError(f"{where}, row {row}: a null in the list; expected integers")
    values = flat.cast(pa.int64()).to_numpy(zero_copy_only=False)
    check_ids(values, column.limit, where, row_of)
    return Jagged(values, offsets)


def _integers(array: pa.Array, limit: int | None, where: str) -> np.ndarray:
    try:
        ids = array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:  # unsigned, above 2 ** 63
        raise InputError(f"{where}: {str(error).splitlines()[0]}") from error
    check_ids(ids, limit, where)
    return ids
