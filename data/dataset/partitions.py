"""Columns whose values are in the names of folders: `day=2024-01-01/part-0.parquet`, as Hive and Spark write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from urllib.parse import unquote

import pyarrow as pa

from recpress.data.errors import InputError

Constants = dict[str, pa.Scalar]
"""Column -> its value in all rows of a file."""

_NONE = "__HIVE_DEFAULT_PARTITION__"
_FOLDER = re.compile(r"([^=]+)=(.*)")
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")  # as writers write numbers: `07` is a string
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


def is_partition(name: str) -> bool:
    """Whether the name of a folder holds the value of a column."""
    return _FOLDER.fullmatch(name) is not None


def partition_root(path: str) -> str:
    """The folder above all `column=value` folders at the end of `path`."""
    while is_partition(path.rpartition("/")[2]):
        path = path.rpartition("/")[0]
    return path


def constants(paths: Sequence[str], root: str) -> dict[str, Constants]:
    """Path -> values that the folders below `root` give it: int64 or days if all values of a column are, else strings.

    Raises:
        InputError: files have different columns in the names of their folders.
    """
    found = {path: _values(path, root) for path in paths}
    first = next(iter(found), "")
    for path, values in found.items():
        if values.keys() != found[first].keys():
            named = [" and ".join(f"'{name}'" for name in found[file]) or "none" for file in (path, first)]
            raise InputError(
                f"{path}: columns in the names of its folders: {named[0]}, but {named[1]} in {first}; "
                "expected the same columns for all files"
            )
    types = {name: _type([values[name] for values in found.values()]) for name in found.get(first, {})}
    return {
        path: {name: _scalar(value, types[name]) for name, value in values.items()} for path, values in found.items()
    }


def _values(path: str, root: str) -> dict[str, str | None]:
    folders = path.removeprefix(root).split("/")[:-1]
    pairs = [match.groups() for match in map(_FOLDER.fullmatch, folders) if match]
    return {unquote(name): None if value == _NONE else unquote(value) for name, value in pairs}


def _type(values: Sequence[str | None]) -> pa.DataType:
    known = [value for value in values if value is not None]
    if known and all(_INTEGER.fullmatch(value) for value in known):
        return pa.int64()
    return pa.date32() if known and all(map(_is_day, known)) else pa.string()


def _is_day(text: str) -> bool:
    try:
        return bool(_DAY.fullmatch(text) and date.fromisoformat(text))
    except ValueError:
        return False


def _scalar(value: str | None, kind: pa.DataType) -> pa.Scalar:
    if value is None or kind == pa.string():
        return pa.scalar(value, kind)
    return pa.scalar(int(value) if kind == pa.int64() else date.fromisoformat(value), kind)
