"""Columns of a log: their types, validation, and conversion from Arrow to numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recpress.data.dataset.files import first_line
from recpress.data.dataset.hashed_ids import hash_ids, raw_kind
from recpress.data.errors import InputError

if TYPE_CHECKING:
    import torch

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
    """Ids must be smaller than this; None if it is not known."""
    hashed: bool = False
    """Raw ids of any type, hashed into `limit` ids."""
    within: tuple[float, float] | None = None
    """The smallest and the largest label that are allowed; None: any."""
    time: str | None = None
    """What times are read as: `integer`, `float`, or a zone and a unit (`local ms`, `UTC us`); None: as they are."""


class Jagged(NamedTuple):
    """A list column: row k holds values[offsets[k] : offsets[k + 1]]."""

    values: np.ndarray
    offsets: np.ndarray  # (rows + 1,) int64, the first 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def slice(self, first: int, end: int) -> Jagged:
        """A copy of rows [first, end), so that the larger memory that Arrow decoded can be freed."""
        offsets = self.offsets[first : end + 1]
        return Jagged(self.values[offsets[0] : offsets[-1]].copy(), offsets - offsets[0])

    def take(self, rows: np.ndarray) -> Jagged:
        """The given rows, in the given order."""
        import fbgemm_gpu  # noqa: F401  registers the operator; here, because readers without lists need no torch
        import torch

        lengths, values, _ = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(rows.astype(np.int32)), torch.from_numpy(self.lengths), to_tensor(self.values)
        )
        return Jagged(values.numpy(), np.concatenate(([0], np.cumsum(lengths.numpy()))))


class _Writable:
    """Memory of Arrow, which is read-only. Torch would warn of that, but it only reads here."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory; do not write to it."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def check_type(column: Column, schema: pa.Schema, where: str) -> None:
    """Raises InputError if the column is missing, occurs twice, or has a type that its role does not allow."""
    found = schema.get_all_field_indices(column.name)
    if len(found) != 1:
        names = ", ".join(schema.names)
        many = f"{len(found)} columns" if found else "no column"
        raise InputError(f"{where}: {many} '{column.name}'; expected {_expected(column)}, found {names}")
    kind = schema.field(found[0]).type
    if not _fits(column, kind):
        advice = ""
        if column.role in ("id", "ids", "categorical") and not column.hashed:
            advice = "; `recpress ingest` numbers other ids, and --schema.hashed hashes them"
        raise InputError(f"{where}, column '{column.name}': type {kind}; expected {_expected(column)}{advice}")


def _expected(column: Column) -> str:
    expected = _EXPECTED[column.role]
    return expected.replace("integers", "integers, text or bytes") if column.hashed else expected


def _fits(column: Column, kind: pa.DataType) -> bool:
    kind = _plain(kind)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    value = _plain(kind.value_type) if is_list(kind) else None
    # A writer without a value does not know the type: all lists are empty, or all floats are missing.
    ids = value is not None and (_is_id(column, value) or pa.types.is_null(value))
    match column.role:
        case "id":
            return _is_id(column, kind)
        case "ids":
            return ids
        case "categorical":
            return ids or _is_id(column, kind)
        case "time":
            return number or pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        case "label":
            return number or pa.types.is_boolean(kind)
        case "float":
            return number or pa.types.is_null(kind)


def _is_id(column: Column, kind: pa.DataType) -> bool:
    return raw_kind(kind) is not None if column.hashed else pa.types.is_integer(kind)


def kind_of_values(kind: pa.DataType) -> str | None:
    """`hashed_ids.raw_kind` of the values of a column, also of lists."""
    return raw_kind(kind.value_type if is_list(kind) else kind)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The same with types that all of Arrow's functions take: no views, and the storage of extension types."""
    return pa.schema([field.with_type(_plain_type(field.type)) for field in schema], schema.metadata)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind.fields])
    if pa.types.is_list_view(kind) or pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_large_list_view(kind) or pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind


def plain_table(table: pa.Table) -> pa.Table:
    """The same with the types of `plain_schema`."""
    schema = plain_schema(table.schema)
    if schema.equals(table.schema):
        return table
    columns = []
    for column, field in zip(table.columns, schema, strict=True):
        plain = [_plain_array(chunk, field.type) for chunk in column.chunks]
        columns.append(pa.chunked_array(plain, field.type))
    return pa.table(columns, schema=schema)


def _plain_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type.equals(kind):
        return array
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain_array(array.storage, kind)
    if pa.types.is_struct(kind):
        parts = [_plain_array(part, field.type) for part, field in zip(array.flatten(), kind.fields, strict=True)]
        return pa.StructArray.from_arrays(parts, fields=kind.fields, mask=array.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):  # Arrow's own cast of list views makes short offsets
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        large = pa.types.is_large_list(kind)
        offsets = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)), pa.int64() if large else pa.int32())
        values = _plain_array(array.flatten(), kind.value_type)
        made = (pa.LargeListArray if large else pa.ListArray).from_arrays(offsets, values, mask=array.is_null())
        return made.cast(kind)
    return array.cast(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists of any kind."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in (*lists, pa.types.is_list_view, pa.types.is_large_list_view))


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, whether or not they are in a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


MOST_IDS = 1 << 31
IDS_PER_ROW = 100
FEW_IDS = 1 << 24


def is_dense(largest: int, total: int) -> bool:
    """Whether ids up to `largest` in `total` rows can be numbers from 0: below MOST_IDS, and above FEW_IDS not more
    than IDS_PER_ROW per row. Others are hashes, or keys of a database."""
    return largest < min(MOST_IDS, max(FEW_IDS, IDS_PER_ROW * total))


def check_ids(ids: np.ndarray, limit: int | None, where: str, row_of: Callable[[int], int] | None = None) -> None:
    """Raises InputError, naming the first such row, if an id is negative or not below `limit`.

    One pass if the array is int64 and valid. `where` names file, row group and column. `row_of` gives the row of an
    index of the array, if they differ.
    """
    if ids.size == 0:
        return
    bound = 2**63 if limit is None else limit
    if ids.dtype == np.int64 and int(ids.view(np.uint64).max()) < bound:  # as unsigned a negative id is a huge one
        return
    if int(ids.min()) < 0:
        place, fault = int(np.argmax(ids < 0)), "; expected ids from 0"
    elif limit is not None and int(ids.max()) >= limit:
        place, fault = int(np.argmax(ids >= limit)), f" is outside the vocabulary of {limit} ids"
    else:
        return
    raise InputError(f"{where}, row {row_of(place) if row_of else place}: id {ids[place]}{fault}")


def decode(column: Column, data: pa.ChunkedArray, where: str) -> np.ndarray | Jagged:
    """Check a column of one row group and return it as numpy, without a copy if Arrow allows that.

    Ids and categories are int64, times int64 or float64 (by `column.time`; else timestamps in their stored unit),
    labels and floats float32. A missing float is NaN. Lists are Jagged; a missing list of categories is an empty one.

    Raises:
        InputError: a null that is not allowed, an id that is negative or too large, NaN in a label, a label or float
            that is infinite as float32, a label that is not `within` its limits, a row without negatives.
    """
    where = f"{where}, column '{column.name}'"
    if pa.types.is_dictionary(data.type):  # a hash is taken once for each entry
        data = data.unify_dictionaries() if column.hashed else data.cast(data.type.value_type)
    array = data.combine_chunks() if data.num_chunks != 1 else data.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # no chunks at all
        array = pa.array([], data.type)
    if is_list(array.type):
        return _decode_lists(column, array, where)
    if array.null_count and column.role != "float":
        row = int(np.argmax(pc.is_null(array).to_numpy(zero_copy_only=False)))
        raise InputError(f"{where}, row {row}: null; expected {_expected(column)}")
    if column.hashed:
        return hash_ids(array, column.limit or 1)
    if column.role in ("id", "categorical"):
        return _integers(array, column.limit, where)
    if column.role == "time":
        return _times(column, array, where)
    if pa.types.is_decimal(array.type):  # Arrow multiplies by 0.001, say, which float32 rounds: 3.000 became 3.0000002
        array = array.cast(pa.float64())
    given = array
    if array.type != pa.float32():
        array = array.cast(pa.float32(), safe=False)
    values = array.to_numpy(zero_copy_only=False)
    if not _is_finite(values) and np.isinf(values).any():  # also of a number that is too large for float32
        row = int(np.argmax(np.isinf(values)))
        raise InputError(
            f"{where}, row {row}: {given[row].as_py()}; expected a finite number of 32 bits (up to 3.4e38), or null "
            "if it is missing"
        )
    if column.role == "label" and len(values) and np.isnan(values.max()):  # one NaN makes it NaN
        raise InputError(f"{where}, row {int(np.argmax(np.isnan(values)))}: NaN; expected a number")
    if column.within is not None and len(values):
        low, high = column.within
        if values.min() < low or values.max() > high:
            row = int(np.argmax((values < low) | (values > high)))
            allowed = f"at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
            raise InputError(f"{where}, row {row}: {given[row].as_py()}; --use-label expects numbers {allowed}")
    return values


def _is_finite(values: np.ndarray) -> bool:
    """Two passes without temporaries: faster than `np.isfinite(values).all()`. A NaN makes both sides NaN."""
    return len(values) == 0 or bool(values.min() > -np.inf and values.max() < np.inf)


def _decode_lists(column: Column, array: pa.Array, where: str) -> Jagged:
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if column.role == "ids" and len(lengths) and lengths.min() == 0:
        row = int(np.argmax(lengths == 0))
        raise InputError(f"{where}, row {row}: an empty list; expected at least one item")
    flat = array.flatten()
    if pa.types.is_dictionary(flat.type):
        flat = flat.dictionary_decode()

    def row_of(place: int) -> int:
        return int(np.searchsorted(offsets, place, side="right")) - 1

    if flat.null_count:
        row = row_of(int(np.argmax(pc.is_null(flat).to_numpy(zero_copy_only=False))))
        raise InputError(f"{where}, row {row}: a null in the list; expected integers")
    if column.hashed:
        return Jagged(hash_ids(flat, column.limit or 1), offsets)
    values = _cast(flat, pa.int64(), where).to_numpy(zero_copy_only=False)
    check_ids(values, column.limit, where, row_of)
    return Jagged(values, offsets)


def _times(column: Column, array: pa.Array, where: str) -> np.ndarray:
    if pa.types.is_date(array.type):
        array = array.cast(pa.timestamp("s"))
    if pa.types.is_timestamp(array.type):
        unit = column.time.split()[-1] if column.time else array.type.unit
        array = _cast(array, pa.timestamp(unit, array.type.tz), where)  # of a finer unit: exact, or an error
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if column.time != "float" and pa.types.is_integer(array.type):
        return _cast(array, pa.int64(), where).to_numpy(zero_copy_only=False)
    times = _cast(array, pa.float64(), where).to_numpy(zero_copy_only=False)
    if np.isnan(times).any():
        raise InputError(f"{where}, row {int(np.argmax(np.isnan(times)))}: NaN; expected a time")
    return times


def _cast(array: pa.Array, kind: pa.DataType, where: str) -> pa.Array:
    """Raises InputError if a value does not fit: unsigned above 2 ** 63, say."""
    if array.type == kind:
        return array
    try:
        return array.cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where}: {first_line(error)}") from error


def _integers(array: pa.Array, limit: int | None, where: str) -> np.ndarray:
    try:
        ids = _cast(array, pa.int64(), where).to_numpy(zero_copy_only=False)
    except InputError as error:
        raise InputError(f"{error}; `recpress ingest` numbers raw ids") from error
    check_ids(ids, limit, where)
    return ids
