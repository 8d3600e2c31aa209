"""Readers of named columns (csv, tsv, json, parquet): raw rows in pieces with their origin, in bounded memory.

Columns of the pieces have the log's own names (`user_id`, `item_id`, `label`, `time`, and further ones as
they are called); `RawLog.names` has those of the files. Their values are still raw. Errors name a row of text by its
line in the file, counted from 1 (a header and empty lines count too), and a row of Parquet by its number, from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import IngestConfig, Schema
from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RawFile, RowNumbers
from recpress.data.ingest.raw_text import (
    COLUMN_OPTIONS,
    UNREADABLE,
    Dialect,
    choose_delimiter,
    first_lines,
    header,
    listed,
    read_delimited,
    read_json_lines,
)

_BATCH = 1 << 18  # rows of Parquet


@dataclass(frozen=True)
class Piece:
    """Some raw rows of one part, or of several if the table has a column `split`."""

    part: str
    where: str
    rows: RowNumbers
    table: pa.Table


@dataclass(frozen=True)
class RawLog:
    """The files of one format, and readers of their raw rows."""

    format: str
    files: tuple[RawFile, ...]
    schema: Schema
    pieces: Callable[[], Iterator[Piece]]
    negatives: Callable[[], Iterator[Piece]] | None = None
    """Columns user_id, item_id and negatives (lists), raw."""
    users: Callable[[], pa.Table] | None = None
    """Side table with a column `raw`; the others are strings, lists of strings or floats."""
    items: Callable[[], pa.Table] | None = None
    untyped: frozenset[str] = frozenset()
    """Columns of text files, which have no types: their ids may be integers."""
    integer_ids: bool = False
    """The ids of the format are integers."""
    names: dict[str, str] = field(default_factory=dict)
    """Name in the log -> name in the files, which errors use; a column without an entry has the same name in both."""


def named_columns(config: IngestConfig) -> dict[str, str]:
    """Name in the file -> name in the log, of csv, tsv, json and parquet. Raises InputError if two columns have the
    same name."""
    columns: dict[str, str] = {}
    own = [
        (config.user, "user_id"),
        (config.item, "item_id"),
        (config.label, "label"),
        (config.time, "time"),
        (config.split_column, "split"),
        *((name, name) for name in (*config.categorical, *config.floats)),
    ]
    for name, target in own:
        if not name:
            continue
        if name in columns or target in columns.values():
            raise InputError(f"ingest: column '{name}' is given two meanings, or has the name of another column")
        columns[name] = target
    if bool(config.user) != bool(config.item):
        raise InputError("ingest: set both a user and an item column, or neither")
    if not columns:
        raise InputError("ingest: no columns are set; expected a user and an item column, or categorical columns")
    return columns


_WILDCARDS = re.compile(r"[*?\[]")


def with_matches(config: IngestConfig, found: Callable[[], Sequence[str]]) -> IngestConfig:
    """The config with the names of the columns that its patterns match, in the order of the file.

    Args:
        found: the columns of the first file; called only if there is a pattern.

    Raises:
        InputError: a pattern matches no column, or two match the same one.
    """
    if not any(_WILDCARDS.search(name) for name in (*config.categorical, *config.floats)):
        return config
    columns = [name.strip() for name in found()]
    listed_names = [name for name in (*config.categorical, *config.floats) if name in columns]
    roles = {config.user, config.item, config.label, config.time, config.split_column, *listed_names}
    matched: dict[str, str] = {}  # column -> its pattern

    def expanded(names: Sequence[str]) -> Iterator[str]:
        for name in names:
            if name in columns or not _WILDCARDS.search(name):
                yield name
                continue
            fitting = [column for column in columns if fnmatchcase(column, name) and column not in roles]
            if not fitting:
                raise InputError(f"ingest: no column without another role matches '{name}'; found {listed(columns)}")
            for column in fitting:
                if column in matched:
                    raise InputError(f"ingest: column '{column}' matches both '{matched[column]}' and '{name}'")
                matched[column] = name
                yield column

    return replace(config, categorical=tuple(expanded(config.categorical)), floats=tuple(expanded(config.floats)))


def named_schema(config: IngestConfig) -> Schema:
    return Schema(
        user="user_id" if config.user else "",
        item="item_id" if config.item else "",
        label="label" if config.label else None,
        time="time" if config.time else None,
        categorical=config.categorical,
        floats=config.floats,
    )


def dialect_of(config: IngestConfig, delimiter: str, *, quoted: bool) -> Dialect:
    """The dialect of a format, with the options applied."""
    delimiter = {"\\t": "\t", "tab": "\t"}.get(config.delimiter, config.delimiter) or delimiter
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise InputError(f"ingest: delimiter is {delimiter!r}; expected one ASCII character, or \\t")
    quoted = quoted if config.quoting == "auto" else config.quoting == "on"
    return Dialect(delimiter=delimiter, quoted=quoted, encoding=config.encoding)


def delimited(config: IngestConfig, files: Sequence[RawFile], name: str) -> RawLog:
    """Plain CSV or TSV with named columns."""
    names = list(config.columns) or None
    dialect = dialect_of(config, "\t" if name == "tsv" else ",", quoted=name == "csv")

    def in_first_file() -> list[str]:
        plain = [name for name in (config.user, config.item, config.label, config.time) if name]
        return names or header(files[0], choose_delimiter(files[0], dialect, plain))

    config = with_matches(config, in_first_file)
    columns = named_columns(config)
    may_differ = names is None and not config.delimiter  # each file may have another delimiter

    def read(file: RawFile, wanted: Sequence[str]) -> Iterator[tuple[RowNumbers, pa.Table]]:
        of_file = choose_delimiter(file, dialect, wanted) if may_differ else dialect
        return read_delimited(file, of_file, wanted, names)

    return _named(config, files, name, read, frozenset(columns.values()))


def json_lines(config: IngestConfig, files: Sequence[RawFile]) -> RawLog:
    """JSON lines with named keys."""
    for file in files:
        if first_lines(file, config.encoding).lstrip()[:1] == "[":
            raise InputError(
                f"{file.where}: a JSON array; expected JSON lines, one object per line (`jq -c '.[]'` converts it)"
            )
    for name in (*config.categorical, *config.floats):
        if _WILDCARDS.search(name):
            raise InputError(f"ingest: '{name}' is a pattern; expected names, because JSON lines may lack any key")
    return _named(
        config, files, "json", lambda file, wanted: read_json_lines(file, wanted, config.encoding), frozenset()
    )


def parquet(config: IngestConfig, files: Sequence[RawFile]) -> RawLog:
    """Parquet with named columns."""
    config = with_matches(config, lambda: _parquet_names(files[0]))
    return _named(config, files, "parquet", _read_parquet, frozenset())


def _named(
    config: IngestConfig,
    files: Sequence[RawFile],
    name: str,
    read: Callable[[RawFile, Sequence[str]], Iterator[tuple[RowNumbers, pa.Table]]],
    untyped: frozenset[str],
) -> RawLog:
    columns = named_columns(config)
    keys = _partition_keys(files, columns)

    def pieces() -> Iterator[Piece]:
        for file in files:
            values = dict(file.partitions)
            wanted = [column for column in columns if column not in keys]
            if not wanted:
                raise InputError(f"{file.where}: every column is a partition; expected one in the file")
            for rows, table in read(file, wanted):
                found = {column: table.column(column) for column in wanted}
                found |= {key: pa.repeat(pa.scalar(values[key], pa.string()), table.num_rows) for key in keys}
                yield Piece("train", file.where, rows, pa.table({columns[c]: found[c] for c in columns}))

    return RawLog(
        name,
        tuple(files),
        named_schema(config),
        pieces,
        untyped=untyped | {columns[key] for key in keys},
        names={target: column for column, target in columns.items()},
    )


def _partition_keys(files: Sequence[RawFile], columns: dict[str, str]) -> list[str]:
    """Columns that the names of the folders give. Raises InputError if files differ in them."""
    keys = [column for column in columns if any(column in dict(file.partitions) for file in files)]
    for key in keys:
        for file in files:
            if key not in dict(file.partitions):
                raise InputError(f"{file.where}: its folder has no partition '{key}=', but that of other files has")
    return keys


def _parquet_names(file: RawFile) -> list[str]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            return pq.read_schema(stream).names
    except UNREADABLE as error:
        raise InputError(f"{file.where}: {first_line(error)}") from error


def _read_parquet(file: RawFile, columns: Sequence[str]) -> Iterator[tuple[RowNumbers, pa.Table]]:
    first = 0
    try:
        with (
            file.filesystem.open_input_file(file.path) as stream,
            pq.ParquetFile(stream, page_checksum_verification=True) as reader,
        ):
            names = reader.schema_arrow.names
            for name in columns:
                if names.count(name) != 1:
                    many = f"{names.count(name)} columns" if name in names else "no column"
                    fix = "" if name in names else f"; {COLUMN_OPTIONS}"
                    raise InputError(f"{file.where}: {many} '{name}'; found {listed(names)}{fix}")
            for batch in reader.iter_batches(_BATCH, columns=list(columns)):
                yield RowNumbers(first), pa.Table.from_batches([batch]).select(list(columns))
                first += batch.num_rows
            if first != reader.metadata.num_rows:
                raise InputError(f"{file.where}: {first} rows; its footer says {reader.metadata.num_rows}")
    except UNREADABLE as error:
        raise InputError(f"{file.where}: {first_line(error)}") from error
