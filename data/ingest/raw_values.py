"""Raw values of any Arrow type -> exact ids, numbers, times and categories, or an error that names the row.

Text has no types: in a delimited file `007` may be a number or a string. So ids of text are strings unless all of them,
in all files, are written as integers (`Vocabulary`), and numbers and times are parsed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RowNumbers

NULLS = ("", "#N/A", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null", "None", "none", "-NaN", "-nan", "\\N")
"""Texts that mean a missing number or time, by default."""
UNITS = ("ms", "us", "ns")  # from coarse to fine
_INTEGER = r"^(0|-?[1-9][0-9]*)$"

Class = Literal["text", "number", "boolean", "date", "time", "none"]


class Times(NamedTuple):
    """Times of one batch."""

    zone: str
    """`number`, `local` (without a time zone) or `UTC`."""
    unit: str
    """`integer` or `float`; or the finest unit that the timestamps need: `ms`, `us` or `ns`."""
    values: pa.Array


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array, without dictionaries, views and extension types but UUID."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # without chunks, or too long for one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):
        return _uuids(array) if kind.extension_name == "arrow.uuid" else plain(array.storage)
    if pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return array.cast(pa.large_string())
    if pa.types.is_binary_view(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.large_binary())
    return array


def class_of(array: pa.Array) -> Class | None:
    """The class of the ids of a plain array; ids of two classes are never equal. None: the values cannot be ids."""
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_null(kind):
        return "none"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_date(kind):
        return "date"
    return "time" if pa.types.is_timestamp(kind) else None


def missing(array: pa.Array, nulls: Sequence[str] = ("",)) -> np.ndarray:
    """(n,) bool: null, NaN, or one of the strings that mean a missing value."""
    found = pc.is_null(array, nan_is_null=True)
    if pa.types.is_large_string(array.type):
        found = pc.or_(found, pc.is_in(array, value_set=pa.array(list(nulls), array.type)))
    elif pa.types.is_large_binary(array.type):
        found = pc.or_(found, pc.fill_null(pc.equal(pc.binary_length(array), 0), True))
    return found.to_numpy(zero_copy_only=False)


def ids(array: pa.Array, where: str, rows: RowNumbers) -> pa.Array:
    """Ids of a plain array without missing ones: int64 where they are integers that fit, else large_string.

    Numbers of any type are equal if their values are. Raises InputError if a float is not an exact integer.
    """
    kind = array.type
    if pa.types.is_integer(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            return array.cast(pa.large_string())
    if pa.types.is_floating(kind):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        bad = ~((np.abs(values) < 2**53) & (values == np.floor(values)))
        _refuse(bad, array, where, rows, "expected an integer below 2 ** 53, or text")
        return pa.array(values.astype(np.int64))
    return text(array)


def integer_text(strings: pa.Array) -> pa.Array | None:
    """int64 if every string is an integer without leading zeros or `+`, and fits; else None."""
    try:
        values = strings.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return values if values.cast(strings.type).equals(strings) else None


def refuse_other_integers(strings: pa.Array, where: str, rows: RowNumbers) -> None:
    """Raises InputError for the first string that is not an integer, has leading zeros, or exceeds 64 bits."""
    good = pc.match_substring_regex(strings, _INTEGER).to_numpy(zero_copy_only=False)
    place = int(np.argmin(good)) if not good.all() else int(np.argmax(pc.utf8_length(strings).to_numpy()))
    raise InputError(
        f"{where}, {rows.name(place)}: id {strings[place].as_py()!r}; expected an integer without leading zeros, as "
        "all ids of the vocabulary are (--id-type int also takes 007 for 7)"
    )


def refuse_mixed_floats(strings: pa.Array, where: str, rows: RowNumbers, *, integers: bool) -> None:
    """Raises InputError if some ids of text are written like `1.0`, and others, or earlier ones (`integers`), like
    `1`."""
    floats = pc.match_substring_regex(strings, r"^-?[0-9]+\.0+$").to_numpy(zero_copy_only=False)
    if floats.any() and (integers or pc.any(pc.match_substring_regex(strings, _INTEGER)).as_py()):
        place = int(np.argmax(floats))
        raise InputError(
            f"{where}, {rows.name(place)}: id {strings[place].as_py()!r}, but others are written as integers; "
            "expected one form (--id-type string takes them as different ids)"
        )


def text(array: pa.Array) -> pa.Array:
    """large_string of a plain array: values are equal if and only if their texts are.

    Bytes that are not UTF-8 become `\\x` and hexadecimal digits. Decimals lose trailing zeros.
    """
    kind = array.type
    if pa.types.is_large_string(kind):
        return array
    if pa.types.is_large_binary(kind):
        return _bytes_as_text(array)
    if pa.types.is_decimal(kind):
        strings = array.cast(pa.large_string())
        if pc.any(pc.match_substring(strings, "E")).as_py():  # Arrow writes 0.00000001 as 1E-8
            plain = [None if value is None else f"{value:f}" for value in array.to_pylist()]
            strings = pa.array(plain, pa.large_string())
        strings = pc.replace_substring_regex(strings, r"^([^.]*\..*?)0+$", r"\1")
        return pc.replace_substring_regex(strings, r"\.$", "")
    return array.cast(pa.large_string())


def floats(array: pa.Array, where: str, rows: RowNumbers, nulls: Sequence[str]) -> pa.Array:
    """float32 of a plain array of numbers, booleans or text; a missing value is NaN.

    Raises InputError if a value is not a number, is infinite, or exceeds float32.
    """
    kind = array.type
    gone = missing(array, nulls)
    if gone.all():
        return pa.array(np.full(len(array), np.nan, np.float32))
    known = np.flatnonzero(~gone)
    values = array.take(pa.array(known)) if len(known) < len(array) else array
    if pa.types.is_decimal(kind):
        values = values.cast(pa.large_string())  # Arrow multiplies by a power of ten, which rounds; parsing rounds once
    if pa.types.is_large_binary(kind):
        values = text(values)
    if pa.types.is_large_string(values.type):
        numbers = _parsed(values, where, rows, known)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    else:
        raise InputError(f"{where}: type {kind}; expected numbers")
    with np.errstate(over="ignore"):
        result = np.full(len(array), np.nan, np.float32)
        result[known] = numbers
    bad = np.zeros(len(array), bool)
    bad[known] = ~np.isfinite(result[known])
    _refuse(bad, array, where, rows, "expected a finite number of at most 3.4e38")
    return pa.array(result)


def times(array: pa.Array, where: str, rows: RowNumbers) -> Times:
    """Times of a plain array of numbers, timestamps, dates, or text of one of them, none missing; exact.

    Raises InputError if a value is none of these, or does not fit.
    """
    kind = array.type
    if pa.types.is_large_binary(kind):
        array = text(array)
    if pa.types.is_large_string(array.type):
        return _times_of_text(pc.utf8_trim_whitespace(array), where, rows)
    if pa.types.is_integer(kind):
        try:
            return Times("number", "integer", array.cast(pa.int64()))
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}: {first_line(error)}") from error
    if pa.types.is_decimal(kind):
        return _times_of_text(text(array), where, rows)
    if pa.types.is_floating(kind):
        values = array.cast(pa.float64())
        _refuse(~np.isfinite(values.to_numpy(zero_copy_only=False)), array, where, rows, "expected a finite time")
        return Times("number", "float", values)
    if pa.types.is_date(kind):
        array = array.cast(pa.timestamp("s"))
    if not pa.types.is_timestamp(array.type):
        raise InputError(f"{where}: time has type {kind}; expected numbers, timestamps or dates")
    zone = "local" if array.type.tz is None else "UTC"
    unit = array.type.unit if array.type.unit in UNITS else "ms"
    try:
        return Times(zone, unit, array.cast(pa.timestamp(unit, None if zone == "local" else "UTC")))
    except pa.ArrowInvalid as error:
        raise InputError(f"{where}: {first_line(error)}") from error


EPOCHS = {1: "seconds", 3: "milliseconds", 5: "microseconds", 7: "nanoseconds"}
"""Magnitude -> what numbers of it count since 1970 if they are times from 1973 to 2286, whose ranges do not overlap."""


def magnitudes(numbers: pa.Array) -> dict[int, int]:
    """Magnitude -> the place of the first number of it: those of `EPOCHS`, and even ones for numbers between them."""
    edges = [10.0 ** (power + 3 * k) for k in range(4) for power in (8, 10)]
    found, places = np.unique(np.digitize(numbers.to_numpy(zero_copy_only=False), edges), return_index=True)
    return dict(zip(found.tolist(), places.tolist(), strict=True))


def in_unit(found: Times, unit: str, where: str) -> pa.Array:
    """Times in a unit that is as fine as their own: int64, float64 or a timestamp.

    Raises InputError if a value does not fit.
    """
    if found.zone == "number":
        kind = pa.int64() if unit == "integer" else pa.float64()
    else:
        kind = pa.timestamp(unit, "UTC" if found.zone == "UTC" else None)
    try:
        return found.values.cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where}: {first_line(error)}") from error


def finer(one: str, other: str) -> str:
    """The unit that represents both."""
    if one in UNITS:
        return max(one, other, key=UNITS.index)
    return "float" if "float" in (one, other) else "integer"


def _times_of_text(strings: pa.Array, where: str, rows: RowNumbers) -> Times:
    given, strings = strings, pc.replace_substring_regex(strings, r"\s*(UTC|GMT|Z)$", "Z")
    number = pc.match_substring_regex(strings, r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
    number = number.to_numpy(zero_copy_only=False)
    if number.all():
        if (integers := integer_text(strings)) is not None:
            return Times("number", "integer", integers)
        if pc.all(pc.match_substring_regex(strings, _INTEGER)).as_py():
            raise InputError(f"{where}: a time that exceeds 64 bits; expected at most {2**63 - 1}")
        values = strings.cast(pa.float64())
        _refuse(~np.isfinite(values.to_numpy(zero_copy_only=False)), strings, where, rows, "expected a finite time")
        return Times("number", "float", values)
    row = int(np.argmax(number))
    if number.any():
        other = int(np.argmin(number))
        raise InputError(
            f"{where}: {strings[row].as_py()!r} in {rows.name(row)}, {strings[other].as_py()!r} in {rows.name(other)}"
            "; expected times of one kind, numbers or dates"
        )
    zoned = pc.match_substring_regex(strings, r"(Z|[+-][0-9]{2}:?([0-9]{2})?)$")
    zoned = pc.and_(zoned, pc.match_substring(strings, ":")).to_numpy(zero_copy_only=False)
    if zoned.any() and not zoned.all():
        row, other = int(np.argmax(zoned)), int(np.argmin(zoned))
        raise InputError(
            f"{where}: {strings[row].as_py()!r} in {rows.name(row)} has a time zone, {strings[other].as_py()!r} in "
            f"{rows.name(other)} has none; expected times of one kind"
        )
    zone = "UTC" if zoned.any() else "local"
    for unit in UNITS:
        try:
            return Times(zone, unit, strings.cast(pa.timestamp(unit, "UTC" if zone == "UTC" else None)))
        except pa.ArrowInvalid as error:
            fault = error
    bad = np.array([not _is_time(strings, k, zone) for k in range(len(strings))])
    expected = "expected a number, or a date such as 2024-01-31 or 2024-01-31T23:59:59.123Z"
    _refuse(bad, given, where, rows, expected)
    raise InputError(f"{where}: {first_line(fault)}")


def _is_time(strings: pa.Array, row: int, zone: str) -> bool:
    for unit in UNITS:
        try:
            strings.slice(row, 1).cast(pa.timestamp(unit, "UTC" if zone == "UTC" else None))
        except pa.ArrowInvalid:
            continue
        return True
    return False


def _parsed(strings: pa.Array, where: str, rows: RowNumbers, known: np.ndarray) -> np.ndarray:
    """float64 of text; `true` and `false` are 1 and 0."""
    strings = pc.utf8_trim_whitespace(strings)
    try:
        return strings.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        pass
    try:
        return strings.cast(pa.bool_()).cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        pass
    for k in range(len(strings)):
        try:
            strings.slice(k, 1).cast(pa.float64())
        except pa.ArrowInvalid:
            text = strings[k].as_py()
            comma = " without commas (4.5, 1234)" if re.fullmatch(r"[-+\d.]*,[\d.,]*", text) else ""
            raise InputError(f"{where}, {rows.name(known[k])}: {text!r}; expected a number{comma}") from None
    raise AssertionError("every string is a number, but the array is not")


def _uuids(array: pa.Array) -> pa.Array:
    return pa.array([None if value is None else str(value) for value in array.to_pylist()], pa.large_string())


def _bytes_as_text(array: pa.Array) -> pa.Array:
    escaped = pc.any(pc.starts_with(array, rb"\x")).as_py()
    if not escaped:
        try:
            return array.cast(pa.large_string())
        except pa.ArrowInvalid:
            pass
    return pa.array([None if value is None else _escaped(value) for value in array.to_pylist()], pa.large_string())


def _escaped(value: bytes) -> str:
    if not value.startswith(rb"\x"):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return r"\x" + value.hex()


def _refuse(bad: np.ndarray, array: pa.Array, where: str, rows: RowNumbers, expected: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(f"{where}, {rows.name(row)}: {array[row].as_py()!r}; {expected}")
