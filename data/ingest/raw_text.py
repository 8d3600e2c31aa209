"""Delimited text, lines and JSON lines -> tables, in bounded memory.

pyarrow.csv parses delimited text. All values stay strings here, because their types depend on all files; `raw_values`
converts them. Python's csv reads the header, Python's json JSON lines.
"""

from __future__ import annotations

import codecs
import csv
import decimal
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RawFile, RowNumbers, compression

BLOCK = 16 << 20
"""Bytes of text that are parsed at once; a line may not be longer."""
_HEADER = 1 << 20
"""Bytes of a header line, at most."""
_LINES = 4 << 20
"""Bytes of lines that become Python objects at once."""
_BOMS = (  # in this order: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
UNREADABLE = (pa.ArrowException, OSError, EOFError, UnicodeError, zlib.error, zipfile.BadZipFile, MemoryError)
"""Errors of reading a corrupt file, besides InputError."""


_FOREIGN = {
    b"\x1f\x8b": "compressed by gzip; expected a name that ends in .gz",
    b"BZh9": "compressed by bzip2; expected a name that ends in .bz2",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; expected a name that ends in .zst",
    b"\xfd7zX": "compressed by xz; expected it unpacked, or gzip, bzip2, zstd or lz4",
    b"PK\x03\x04": "a zip file or a spreadsheet; expected text (a .zip file is read as a folder)",
    b"PAR1": "a Parquet file; expected text (--format parquet)",
}
"""First bytes of other files -> what errors say."""
COLUMN_OPTIONS = "--user, --item, --label and --time name the columns"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The dialect of a text file."""

    delimiter: str = ","
    quoted: bool = True
    encoding: str = "auto"
    """A codec of Python; `auto`: UTF-8, or that of a byte order mark."""


def open_text(file: RawFile, encoding: str = "auto") -> pa.NativeFile:
    """The bytes of a file, decompressed, in UTF-8 without a byte order mark."""
    stream = _open(file)
    if encoding == "auto":
        with stream:
            head = bytes(stream.read(4))
        _refuse_foreign(head, file)
        encoding = next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")
        stream = _open(file)
    codec = codecs.lookup(encoding).name
    return stream if codec in ("utf-8", "utf-8-sig") else pa.transcoding_input_stream(stream, codec, "utf-8")


def _refuse_foreign(head: bytes, file: RawFile) -> None:
    """Raises InputError for files that are no text in UTF-8, by their first four bytes."""
    for mark, found in _FOREIGN.items():
        if head.startswith(mark):
            raise InputError(f"{file.where}: {found}")
    if b"\0" in head and not head.startswith(tuple(mark for mark, _ in _BOMS)):
        raise InputError(
            f"{file.where}: begins with zero bytes, as UTF-16 without a byte order mark does; expected UTF-8, or "
            "--encoding utf-16-le"
        )


def _open(file: RawFile) -> pa.NativeFile:
    try:
        return file.filesystem.open_input_stream(file.path, compression=compression(file.path))
    except (RuntimeError, ValueError) as error:  # of a zip file: encrypted, or an unknown compression
        raise InputError(f"{file.where}: cannot be opened: {first_line(error)}") from error


def first_lines(file: RawFile, encoding: str = "auto") -> str:
    """The beginning of a file, up to 16 KiB, as text."""
    try:
        with open_text(file, encoding) as stream:
            return bytes(stream.read(1 << 14)).decode("utf-8-sig", errors="replace")
    except UNREADABLE as error:
        raise InputError(f"{file.where}: {first_line(error)}") from error


def header(file: RawFile, dialect: Dialect) -> list[str]:
    """Names in the header line, unchanged. Raises InputError if there is none."""
    try:
        with open_text(file, dialect.encoding) as stream:
            head = bytes(stream.read(_HEADER)).decode("utf-8-sig", errors="replace")
        quotes: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE}
        lines = csv.reader(io.StringIO(head, newline=""), delimiter=dialect.delimiter, **quotes)
        found = next((line for line in lines if line), None)
    except (csv.Error, *UNREADABLE) as error:
        raise InputError(f"{file.where}: {first_line(error)}") from error
    if found is None:
        raise InputError(f"{file.where}: empty; expected a header line")
    return found


def choose_delimiter(file: RawFile, dialect: Dialect, needed: Sequence[str]) -> Dialect:
    """The dialect, with the first delimiter by which the header has all the needed columns, if there is one."""
    for delimiter in dict.fromkeys((dialect.delimiter, ";", "\t", "|", ",")):
        candidate = replace(dialect, delimiter=delimiter)
        if set(needed) <= {name.strip() for name in header(file, candidate)}:
            return candidate
    return dialect


def read_delimited(
    file: RawFile, dialect: Dialect, columns: Sequence[str], names: Sequence[str] | None = None
) -> Iterator[tuple[RowNumbers, pa.Table]]:
    """Rows of the file, and a table of strings with their values. Empty lines are not rows.

    Args:
        columns: to read, in this order. Spaces around a name in the file are ignored; if the header has spaces after
            its delimiters (`a, b`), spaces around values are ignored too.
        names: of the columns of a file without a header line.

    Raises:
        InputError: a column is missing or occurs twice; a line has too few or too many fields; a quote is not closed,
            or closed before the end of its field; bytes are not valid in the encoding.
    """
    found = list(names) if names else header(file, dialect)
    in_file = _match(file, dialect, columns, found)
    spaced = names is None and any(name != name.lstrip() for name in found)
    convert = pacsv.ConvertOptions(
        include_columns=in_file, column_types={name: pa.binary() for name in in_file}, strings_can_be_null=False
    )
    parse = pacsv.ParseOptions(
        delimiter=dialect.delimiter,
        quote_char='"' if dialect.quoted else False,
        newlines_in_values=dialect.quoted,
        ignore_empty_lines=len(found) > 1,
    )
    line_of = partial(_line_of, file, dialect, names is None, len(found) > 1)
    row = 0
    try:
        with open_text(file, dialect.encoding) as stream:
            source = pa.PythonFile(_QuotesChecked(stream, file.where, dialect), "r") if dialect.quoted else stream
            # With threads, Arrow does not say which row is wrong.
            read = pacsv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=list(names) if names else None)
            with pacsv.open_csv(source, read_options=read, parse_options=parse, convert_options=convert) as reader:
                for batch in reader:
                    rows = RowNumbers(row, line_of)
                    values = [_decoded(column, file, name, rows) for name, column in zip(columns, batch, strict=True)]
                    if spaced:
                        values = [pc.utf8_trim_whitespace(column) for column in values]
                    yield rows, pa.table(values, names=list(columns))
                    row += batch.num_rows
    except UNREADABLE as error:
        message = first_line(error)
        if fields := re.fullmatch(r"CSV parse error: Row #(\d+): (Expected \d+ columns, got .*)", message):
            line = line_of(int(fields[1]) - (2 if names is None else 1))
            fix = "is the delimiter right? are quotes part of the values? --delimiter, --quoting"
            raise InputError(f"{file.where}, line {line}: {fields[2]} ({fix})") from error
        after = f", after line {line_of(row - 1)}" if row else ""
        raise InputError(f"{file.where}{after}: {message}") from error


def _line_of(file: RawFile, dialect: Dialect, has_header: bool, skips_empty: bool, row: int) -> int:
    """The line, counted from 1, on which the row with this ordinal begins. Reads the file again, for an error alone."""
    limit = csv.field_size_limit(4 * BLOCK)
    try:
        with (
            open_text(file, dialect.encoding) as stream,
            io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as lines,
        ):
            quoting = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
            reader = csv.reader(lines, delimiter=dialect.delimiter, quoting=quoting)  # type: ignore[arg-type]
            before = 0
            for fields in reader:
                if fields or not (skips_empty or has_header):
                    if has_header:
                        has_header = False
                    elif row == 0:
                        break
                    else:
                        row -= 1
                before = reader.line_num
            return before + 1
    finally:
        csv.field_size_limit(limit)


def listed(names: Iterable[str]) -> str:
    """Names for an error, in one line."""
    return " ".join(", ".join(names).split())[:500]


def _match(file: RawFile, dialect: Dialect, columns: Sequence[str], found: Sequence[str]) -> list[str]:
    """The names of the columns in the file."""
    result = []
    for name in columns:
        same = [other for other in found if other == name] or [other for other in found if other.strip() == name]
        if len(same) > 1:
            raise InputError(f"{file.where}: {len(same)} columns '{name}'; expected one")
        if not same and not dialect.quoted and name in (other.strip().strip('"') for other in found):
            raise InputError(
                f"{file.where}: the header encloses {name} in quotes; expected --quoting on for such a file"
            )
        if not same:
            raise InputError(
                f"{file.where}: no column '{name}'; found {listed(found)} (delimiter {dialect.delimiter!r}); "
                f"{COLUMN_OPTIONS}; if there is no header: --columns"
            )
        result.append(same[0])
    return result


def _decoded(column: pa.Array, file: RawFile, name: str, rows: RowNumbers) -> pa.Array:
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        row = next(k for k, value in enumerate(column.to_pylist()) if not _is_utf8(value))
        raise InputError(
            f"{file.where}, {rows.name(row)}, column '{name}': not UTF-8; set the encoding (such as --encoding latin-1)"
        ) from None


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


class _QuotesChecked(io.RawIOBase):
    """A stream of quoted text that raises InputError for text after a closing quote, and for a quote that is not
    closed.
    pyarrow accepts both, but merges or changes rows: usually such quotes are part of the values."""

    def __init__(self, stream: pa.NativeFile, where: str, dialect: Dialect) -> None:
        super().__init__()
        self._stream = stream
        self._where = where
        self._delimiter = dialect.delimiter.encode()
        d = re.escape(self._delimiter)
        quoted, plain = rb'"[^"]*+(?:""[^"]*+)*+"', rb'(?!")[^%b\r\n]*+' % d
        # Bounded, and matched again and again, because Python before 3.11.5 matches a possessive repetition of
        # alternatives incorrectly (https://github.com/python/cpython/issues/106052); a plain one would fill the memory.
        self._fields = re.compile(rb"(?:(?:%b|%b)(?:%b|\r\n?|\n)){1,4096}" % (quoted, plain, d))
        self._begun = re.compile(rb'(?:"[^"]*+(?:""[^"]*+)*+"?+|%b)\Z' % plain)
        self._last = re.compile(rb"(?:%b|%b)\Z" % (quoted, plain))
        self._rest = b""
        self._lines = 0
        self._at_start = True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = bytes(self._stream.read(size if size >= 0 else None))
        text = data
        if self._at_start and data:
            self._at_start, text = False, data.removeprefix(codecs.BOM_UTF8)
        text = self._rest + text
        if b'"' in text:
            end = 0
            while fields := self._fields.match(text, end):
                end = fields.end()
        else:
            end = max(text.rfind(mark) for mark in (self._delimiter, b"\n", b"\r")) + 1
        self._lines += text.count(b"\n", 0, end)
        self._rest = text[end:]
        if not (self._begun if data else self._last).match(self._rest):
            raise InputError(
                f"{self._where}, line {self._lines + 1}: text after a closing quote, or a quote that is not closed; if "
                "quotes are part of the values: --quoting off"
            )
        return data


def read_lines(file: RawFile, encoding: str = "auto") -> Iterator[tuple[RowNumbers, pa.Array]]:
    """Lines, which end at a newline alone, as strings without it."""
    row, rest = 0, b""
    try:
        with open_text(file, encoding) as stream:
            while data := bytes(stream.read(_LINES)):
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    yield _text_lines(lines, file, row)
                    row += len(lines)
                if len(rest) > 4 * BLOCK:
                    raise InputError(f"{file.where}, line {row + 1}: more than {4 * BLOCK >> 20} MiB")
            if rest:
                yield _text_lines([rest], file, row)
    except UNREADABLE as error:
        raise InputError(f"{file.where}: {first_line(error)}") from error


def _text_lines(lines: list[bytes], file: RawFile, first: int) -> tuple[RowNumbers, pa.Array]:
    lines[0] = lines[0].removeprefix(codecs.BOM_UTF8) if first == 0 else lines[0]
    rows, array = RowNumbers(first, _next), pa.array([line.removesuffix(b"\r") for line in lines], pa.binary())
    return rows, _decoded(array, file, "line", rows)


def _next(ordinal: int) -> int:
    """The number of a line, counted from 1."""
    return ordinal + 1


def read_json_lines(
    file: RawFile, columns: Sequence[str], encoding: str = "auto"
) -> Iterator[tuple[RowNumbers, pa.Table]]:
    """One object per line. A missing key is null. Empty lines are not rows.

    Raises:
        InputError: a line is not a JSON object, a key occurs twice, a column has values of several types, or no object
            of the first lines has a column.
    """
    kinds: dict[str, tuple[str, int]] = {}
    started = False
    for at, lines in read_lines(file, encoding):
        numbered = [(_next(at.first + k), line) for k, line in enumerate(lines.to_pylist()) if line.strip()]
        if not numbered:
            continue
        numbers = [number for number, _ in numbered]
        objects = [_json_object(line, file, number) for number, line in numbered]
        for name in columns:
            if not started and not any(name in row for row in objects):
                raise InputError(f"{file.where}: no column '{name}'; found {listed(objects[0])}; {COLUMN_OPTIONS}")
        started = True
        table = pa.table({name: _json_column(name, objects, file, numbers, kinds) for name in columns})
        yield RowNumbers(0, numbers.__getitem__), table


def _json_object(line: str, file: RawFile, number: int) -> dict[str, Any]:
    try:
        value = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        message = f"{first_line(error)}; expected one JSON object per line"
        raise InputError(f"{file.where}, line {number}: {message}") from error
    if not isinstance(value, dict):
        found = f"JSON {type(value).__name__}; expected one JSON object per line"
        raise InputError(f"{file.where}, line {number}: {found}")
    return value


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _json_column(
    name: str, objects: list[dict[str, Any]], file: RawFile, numbers: list[int], kinds: dict[str, tuple[str, int]]
) -> pa.Array:
    values = [row.get(name) for row in objects]
    types = set(map(type, values)) - {type(None)}
    found = {_json_kind(kind) for kind in types} | ({kinds[name][0]} if name in kinds else set())
    if len(found) > 1:
        _refuse_mixed(name, values, file, numbers, kinds.get(name))
    if found:
        kind = found.pop()
        line = next((number for number, value in zip(numbers, values, strict=True) if value is not None), numbers[0])
        if kind == "object":
            raise InputError(f"{file.where}, line {line}, column '{name}': a JSON object; expected a plain value")
        kinds.setdefault(name, (kind, line))
    try:
        try:
            return pa.array(values)
        except OverflowError:  # integers beyond 64 bits
            if float in types:
                raise
            return pa.array([None if value is None else decimal.Decimal(value) for value in values])
    except (pa.ArrowException, UnicodeError, ValueError, TypeError, OverflowError) as error:
        lines = f"lines {numbers[0]} to {numbers[-1]}"
        raise InputError(f"{file.where}, {lines}, column '{name}': {first_line(error)}") from error


def _refuse_mixed(
    name: str, values: list[Any], file: RawFile, numbers: list[int], known: tuple[str, int] | None
) -> NoReturn:
    for line, value in zip(numbers, values, strict=True):
        if value is None:
            continue
        kind = _json_kind(type(value))
        kind_before, line_before = known = known or (kind, line)
        if kind != kind_before:
            break
    before = f"a {kind_before} in line {line_before}"
    raise InputError(f"{file.where}, line {line}, column '{name}': a JSON {kind}, but {before}; expected one type")


def _json_kind(kind: type) -> str:
    known = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return known.get(kind, "object")


_JSON = json.JSONDecoder(object_pairs_hook=_object_without_repeated_keys)
