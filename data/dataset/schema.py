"""One schema for the files of a log: each column gets one type, whatever each file stores.

Files may differ in width and sign of integers, precision of floats, dictionaries, kinds of lists, nullability, the
order
of columns, and columns that the schema does not name: the values that are read are the same. Differences without a
common meaning are errors: a missing column, strings and integers, lists and single categories, and times that may have
different units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from recpress.data.dataset.columns import Column, check_type, is_list, kind_of_values
from recpress.data.errors import InputError

_UNITS = ("s", "ms", "us", "ns")  # from coarse to fine


def unify(columns: Sequence[Column], schemas: Sequence[tuple[str, pa.Schema]]) -> list[Column]:
    """The columns with the properties common to all files; `Column.time` is what times are read as.

    Args:
        columns: if `time` is already set (by files of the log that were opened before), files must fit it.
        schemas: path and schema of each file.

    Raises:
        InputError: a column is missing, of a wrong type, or cannot be read like that of the other files.
    """
    found = []
    for column in columns:
        having = next((path for path, schema in schemas if column.name in schema.names), None)
        for path, schema in schemas:
            if having is not None and column.name not in schema.names:
                raise InputError(
                    f"{path}: no column '{column.name}', which {having} has; expected it in all files of the log "
                    "(remove it from the schema, or rewrite the files with it)"
                )
            check_type(column, schema, path)
        kinds = [(path, schema.field(column.name).type) for path, schema in schemas]
        if column.role == "categorical":
            _check_lists(column, kinds)
        if column.hashed:
            check_raw_kinds(column.name, kinds)
        if column.role == "time":
            column = replace(column, time=_times(column, kinds))
        found.append(column)
    return found


def stored_as(columns: Sequence[Column], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Types that hold the columns of all files, to write them to one file; unchanged if the files do not differ."""
    fields = []
    for column in columns:
        kinds = [schema.field(column.name).type for schema in schemas]
        same = all(kind == kinds[0] for kind in kinds)
        fields.append(pa.field(column.name, kinds[0] if same else _common(column, kinds[0])))
    return pa.schema(fields)


def cast_rows(table: pa.Table, schema: pa.Schema, columns: Mapping[str, Column]) -> pa.Table:
    """The columns of `schema` in its types, which are those of `stored_as`. Raises pa.ArrowException for a value that
    does not fit.

    Hashed integers may be signed in one file and unsigned in another: their 64 bits stay, which are what is hashed.
    """
    arrays = [
        table.column(field.name).cast(field.type, safe=field.name not in columns or not columns[field.name].hashed)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _common(column: Column, kind: pa.DataType) -> pa.DataType:
    match column.role:
        case "label" | "float":
            return pa.float64()
        case "time":
            zone, _, unit = str(column.time).partition(" ")
            if unit:
                return pa.timestamp(unit, "UTC" if zone == "UTC" else None)
            return pa.int64() if zone == "integer" else pa.float64()
    value = pa.binary() if column.hashed and kind_of_values(kind) == "text" else pa.int64()
    return pa.list_(value) if is_list(kind) else value


def common_time(name: str, times: Sequence[tuple[str, str]]) -> str:
    """What times of these kinds (path, `Column.time`) are all read as: their finest unit, without loss.

    Raises InputError if units may differ: numbers and timestamps, or local times and UTC.
    """
    first, kind = times[0]
    for path, other in times[1:]:
        if {kind, other} == {"integer", "float"}:
            kind = "float"
        elif kind != other:
            (zone, _, unit), (other_zone, _, other_unit) = kind.partition(" "), other.partition(" ")
            if zone != other_zone or not unit:
                raise InputError(
                    f"{path}, column '{name}': {_said(other)}, but {_said(kind)} in {first}; expected one kind in all "
                    "files, because their units may differ"
                )
            kind = f"{zone} {max(unit, other_unit, key=_UNITS.index)}"
    return kind


def check_raw_kinds(name: str, kinds: Sequence[tuple[str, pa.DataType]]) -> None:
    """Raise InputError if a column of raw ids is integers in one file and text in another: their hashes differ."""
    first, kind = kinds[0]
    for path, other in kinds[1:]:
        if kind_of_values(other) != kind_of_values(kind):
            raise InputError(
                f"{path}, column '{name}': type {other}, but {kind} in {first}; expected integers in all files, or "
                "text in all, because the ids are hashed"
            )


def _times(column: Column, kinds: Sequence[tuple[str, pa.DataType]]) -> str:
    named = [(path, _time_of(kind)) for path, kind in kinds]
    if column.time is None:
        return common_time(column.name, named)
    for path, time in named:
        if common_time(column.name, [("earlier files", column.time), (path, time)]) != column.time:
            raise InputError(
                f"{path}, column '{column.name}': {_said(time)}, but {_said(column.time)} in earlier files, "
                "which cannot store it; expected a unit that is not finer"
            )
    return column.time


def _time_of(kind: pa.DataType) -> str:
    """`integer`, `float`, or `local UNIT` and `UTC UNIT` of dates and timestamps."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_timestamp(kind):
        return f"{'local' if kind.tz is None else 'UTC'} {kind.unit}"
    if pa.types.is_date(kind):
        return "local s"
    return "integer" if pa.types.is_integer(kind) else "float"


def _said(time: str) -> str:
    zone, _, unit = time.partition(" ")
    if not unit:
        return f"numbers ({zone})"
    return f"timestamps in {unit} ({'with' if zone == 'UTC' else 'without'} a time zone)"


def _check_lists(column: Column, kinds: Sequence[tuple[str, pa.DataType]]) -> None:
    first, kind = kinds[0]
    for path, other in kinds[1:]:
        if is_list(other) != is_list(kind):
            raise InputError(
                f"{path}, column '{column.name}': type {other}, but {kind} in {first}; expected lists in all files, or "
                "in none"
            )
