"""Readers of other formats: each yields raw rows in pieces, in bounded memory, with the place they come from.

Columns of the pieces have the log's own names (`user_id`, `item_id`, `label`, `time`, and further ones as
they are called); ids are still raw. Rows count from 0, a header line aside, in errors too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from recpress.data.config import IngestConfig, Schema
from recpress.data.errors import InputError
from recpress.data.files import expand, file_type, first_line, list_folder

BLOCK = 16 << 20  # bytes of text that are parsed at once
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Piece:
    """Some raw rows of one part."""

    part: str
    where: str
    first_row: int
    table: pa.Table


@dataclass(frozen=True)
class Source:
    """What a format holds."""

    format: str
    files: tuple[str, ...]
    schema: Schema
    pieces: Callable[[], Iterator[Piece]]
    negatives: Callable[[], Iterator[Piece]] | None = None
    """Columns user_id, item_id and negatives (lists), raw."""
    users: Callable[[], pa.Table] | None = None
    """Side table with a column `raw`; the others are strings, lists of strings or floats."""
    items: Callable[[], pa.Table] | None = None


def read_text(
    filesystem: pafs.FileSystem,
    path: str,
    *,
    delimiter: str,
    names: Sequence[str] | None = None,
    columns: dict[str, str] | None = None,
    types: dict[str, pa.DataType] | None = None,
    quoted: bool = True,
) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a delimited text file (compressed or not) as (ordinal of the first, table).

    Args:
        names: of the columns of a file without a header line.
        columns: only these, renamed: name in the file -> name in the table.
        types: by name in the file; other columns are inferred from the first block.

    Raises:
        InputError: a column that is missing, a line with too few or too many fields, a value of a wrong type.
    """
    options = {
        "read_options": pacsv.ReadOptions(block_size=BLOCK, column_names=names),
        "parse_options": pacsv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, ignore_empty_lines=quoted
        ),
        "convert_options": pacsv.ConvertOptions(include_columns=list(columns) if columns else None, column_types=types),
    }
    if columns:
        found = text_schema(filesystem, path, delimiter, names).names
        for name in columns:
            if name not in found:
                raise InputError(f"{path}: no column '{name}'; found {', '.join(found)}")
    row = 0
    try:
        with filesystem.open_input_stream(path) as stream, pacsv.open_csv(stream, **options) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                yield row, table.rename_columns(list(columns.values())) if columns else table
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def text_schema(
    filesystem: pafs.FileSystem, path: str, delimiter: str, names: Sequence[str] | None = None
) -> pa.Schema:
    """Names and inferred types of the columns, from the first block."""
    try:
        with (
            filesystem.open_input_stream(path) as stream,
            pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(block_size=BLOCK, column_names=names),
                parse_options=pacsv.ParseOptions(delimiter=delimiter),
            ) as reader,
        ):
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {first_line(error)}") from error


def named_columns(config: IngestConfig) -> dict[str, str]:
    """Name in the file -> name in the log, of csv, tsv and parquet. Raises InputError where two are one."""
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
            raise InputError(f"ingest: column '{name}' has two meanings, or the name of another column")
        columns[name] = target
    if bool(config.user) != bool(config.item):
        raise InputError("ingest: give both a user and an item column, or leave both empty")
    return columns


def named_schema(config: IngestConfig) -> Schema:
    return Schema(
        user="user_id" if config.user else "",
        item="item_id" if config.item else "",
        label="label" if config.label else None,
        time="time" if config.time else None,
        categorical=config.categorical,
        floats=config.floats,
    )


def delimited(config: IngestConfig, filesystem: pafs.FileSystem, files: list[str], delimiter: str) -> Source:
    """Plain CSV or TSV with named columns."""
    columns = named_columns(config)
    names = list(config.columns) or None
    found = text_schema(filesystem, files[0], delimiter, names)
    types: dict[str, pa.DataType] = {name: pa.string() for name in config.categorical}
    types |= {name: pa.float64() for name in (config.label, *config.floats) if name}
    types |= {config.split_column: pa.string()} if config.split_column else {}
    for name in filter(None, (config.user, config.item)):
        place = found.get_field_index(name)
        integer = place >= 0 and pa.types.is_integer(found.field(place).type)
        kind = ("int" if integer else "string") if config.id_type == "auto" else config.id_type
        types[name] = pa.int64() if kind == "int" else pa.string()

    def pieces() -> Iterator[Piece]:
        for path in files:
            rows = read_text(filesystem, path, delimiter=delimiter, names=names, columns=columns, types=types)
            for first, table in rows:
                yield from by_part(table, path, first)

    return Source("tsv" if delimiter == "\t" else "csv", tuple(files), named_schema(config), pieces)


def parquet(config: IngestConfig, filesystem: pafs.FileSystem, files: list[str]) -> Source:
    """Parquet with named columns."""
    columns = named_columns(config)

    def pieces() -> Iterator[Piece]:
        for path in files:
            first = 0
            try:
                with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
                    for name in columns:
                        if name not in file.schema_arrow.names:
                            found = ", ".join(file.schema_arrow.names)
                            raise InputError(f"{path}: no column '{name}'; found {found}")
                    for batch in file.iter_batches(1 << 18, columns=list(columns)):
                        table = pa.Table.from_batches([batch]).select(list(columns))
                        yield from by_part(table.rename_columns(list(columns.values())), path, first)
                        first += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: {first_line(error)}") from error

    return Source("parquet", tuple(files), named_schema(config), pieces)


def by_part(table: pa.Table, path: str, first: int) -> Iterator[Piece]:
    """Checks that nothing is missing, and splits rows by the column `split`, if there is one."""
    check_missing(table, path, first)
    if "split" not in table.column_names:
        yield Piece("train", path, first, table)
        return
    split = table.column("split")
    if pa.types.is_dictionary(split.type):
        split = split.cast(split.type.value_type)
    if not _is_text(split.type):
        raise InputError(f"{path}: split column has type {split.type}; expected strings")
    split = pc.utf8_lower(pc.fill_null(split, ""))
    known = pc.is_in(split, value_set=pa.array(list(PARTS), split.type))
    if not pc.all(known).as_py():
        row = pc.index(known, False).as_py()
        raise InputError(f"{path}, row {first + row}: split {split[row].as_py()!r}; expected train, val or test")
    rest = table.drop_columns("split")
    for part in ("train", "val", "test"):
        names = [name for name, target in PARTS.items() if target == part]
        chosen = rest.filter(pc.is_in(split, value_set=pa.array(names, split.type)))
        if chosen.num_rows:
            yield Piece(part, path, first, chosen)


def check_missing(table: pa.Table, path: str, first: int) -> None:
    """Raises InputError where an id, a label or a time is missing, naming the row."""
    for name in ("user_id", "item_id", "label", "time"):
        if name not in table.column_names:
            continue
        column = table.column(name)
        missing = pc.is_null(column, nan_is_null=True)
        if _is_text(column.type):
            missing = pc.or_(missing, pc.fill_null(pc.equal(column, ""), True))
        if pc.any(missing).as_py():
            raise InputError(f"{path}, row {first + pc.index(missing, True).as_py()}: no {name}")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def find_files(config: IngestConfig, filesystem: pafs.FileSystem, path: str, suffixes: Sequence[str]) -> list[str]:
    """The file, the files that match, or those of a folder that have one of the suffixes (also
    compressed)."""
    if file_type(filesystem, path) == pafs.FileType.Directory:
        found = [
            info.path
            for name, info in list_folder(filesystem, path).items()
            if info.type == pafs.FileType.File
            and any(name.endswith(suffix + packed) for suffix in suffixes for packed in ("", ".gz", ".bz2", ".zst"))
        ]
    else:
        found = expand(filesystem, path)
    if not found:
        raise InputError(f"{config.input}: no file; expected {' or '.join('*' + suffix for suffix in suffixes)}")
    return found
