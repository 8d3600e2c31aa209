"""One split of a log, such as train: Parquet files, row groups, and validated reading of single columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from recpress.data.dataset import artifact
from recpress.data.dataset.column_chunks import fetch, leaves
from recpress.data.dataset.columns import Column, Jagged, decode, plain_schema, plain_table
from recpress.data.dataset.files import INGEST_HINT, first_line, retried, shown
from recpress.data.dataset.partitions import Constants, constants
from recpress.data.dataset.schema import unify
from recpress.data.errors import InputError

_REPEATED = 6
"""Bytes per value, dictionary included, below which a column chunk is places in a dictionary."""


@dataclass(frozen=True)
class SplitFile:
    """One Parquet file and its footer, which is read once."""

    path: str
    size: int
    metadata: pq.FileMetaData
    """None if no row group of the file is to be read: it could not be opened, or was read before."""
    constants: Constants = field(default_factory=dict, compare=False)
    """Columns that the names of its folders give it, none of which is in the file."""

    @property
    def schema(self) -> pa.Schema:
        """Of the table that `ParquetSplit.read_table` returns."""
        fields = [*plain_schema(self.metadata.schema.to_arrow_schema())]
        fields += [pa.field(name, value.type) for name, value in self.constants.items()]
        return pa.schema(fields)


@dataclass(frozen=True)
class RowGroup:
    """Identity of a row group (file ordinal in sorted order, ordinal in the file) and its rows."""

    file: int
    group: int
    num_rows: int


@dataclass(frozen=True)
class ParquetSplit:
    """Rows of a log in their natural order. Empty row groups are omitted, which changes no ordinal.

    Safe to share between threads: each read opens its file for itself.
    """

    filesystem: pafs.FileSystem
    files: tuple[SplitFile, ...]
    groups: tuple[RowGroup, ...]
    columns: dict[str, Column]
    user: str | None = None
    """The column of users, if there is one."""
    folders: str | None = None
    """Names of folders below this one may hold values of columns."""
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Path -> fingerprint, if it is known already; shared by all copies of these rows."""

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)

    def with_labels_in(self, column: str, low: float, high: float) -> ParquetSplit:
        """The same rows; reading them raises InputError for a label outside [low, high]."""
        return replace(self, columns=self.columns | {column: replace(self.columns[column], within=(low, high))})

    def where(self, group: RowGroup) -> str:
        """A row group, as errors name it."""
        return f"{self.where_file(group.file)}, row group {group.group}"

    def where_file(self, ordinal: int) -> str:
        """A file, as errors name it."""
        return shown(self.filesystem, self.files[ordinal].path)

    def read_table(self, group: RowGroup, columns: Sequence[str], dictionaries: Sequence[str] = ()) -> pa.Table:
        """The given columns of one row group as they are stored, read by the calling thread alone.

        Text of the columns `dictionaries` stays in the dictionary of its column chunk.

        Raises InputError if the file is damaged.
        """
        file = self.files[group.file]
        stored = [name for name in columns if name not in file.constants]
        kept = [name for name in dictionaries if name not in file.constants]
        paths = [file.metadata.schema.column(place).path for place in leaves(file.metadata, kept)]

        def read() -> pa.Table:
            ranges = fetch(self.filesystem, file.path, file.metadata, group.group, stored)
            places = leaves(file.metadata, stored)
            source = pa.PythonFile(ranges, mode="r")
            with pq.ParquetFile(source, metadata=file.metadata, pre_buffer=False, read_dictionary=paths) as parquet:
                # By ordinals: `columns=["a.b"]` would be a column of that name and part of a struct `a`.
                return parquet.reader.read_row_group(group.group, column_indices=places, use_threads=False)

        if not stored:
            return pa.table({name: pa.repeat(file.constants[name], group.num_rows) for name in columns})
        try:
            table = retried(self.filesystem, self.where(group), read)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.where(group)}: cannot be read: {first_line(error)}") from error
        if table.num_rows != group.num_rows:
            raise InputError(f"{self.where(group)}: {table.num_rows} rows; the footer says {group.num_rows}")
        table = plain_table(table)
        for name in columns:
            if name in file.constants:
                table = table.append_column(name, pa.repeat(file.constants[name], group.num_rows))
        return table

    def read(self, group: RowGroup, columns: Sequence[str]) -> dict[str, np.ndarray | Jagged]:
        """The given columns of one row group, checked: ids int64, labels and floats float32, lists Jagged.

        Raises InputError (see `columns.decode`) naming file, row group, column and row.
        """
        for name in columns:
            if name not in self.columns:
                known = ", ".join(self.columns)
                raise InputError(f"{self.files[0].path}: column '{name}' is not in the schema; it names {known}")
        table = self.read_table(group, columns, [name for name in columns if self._is_repeated(group, name)])
        where = self.where(group)
        return {name: decode(self.columns[name], table.column(name), where) for name in columns}

    def _is_repeated(self, group: RowGroup, name: str) -> bool:
        """Whether to hash the dictionary of a column chunk instead of its rows. A chunk without one has more bytes per
        value, and Arrow would make a dictionary for it, which takes longer than hashing."""
        file = self.files[group.file]
        if not self.columns[name].hashed or name in file.constants:
            return False
        chunk = file.metadata.row_group(group.group).column(leaves(file.metadata, [name])[0])
        return chunk.has_dictionary_page and chunk.total_uncompressed_size < _REPEATED * chunk.num_values

    def read_or_skip(self, group: RowGroup, columns: Sequence[str]) -> dict[str, np.ndarray | Jagged] | None:
        """As `read`; None for a row group that is skipped because it cannot be read."""
        return self.read(group, columns)

    def describe_files(self) -> list[dict[str, str | int]]:
        """Name, size, rows and fingerprint of each file, for manifests; of a skipped file, that it was skipped.

        Takes the fingerprints in parallel, once. Raises InputError if a file cannot be read.
        """
        self.take_fingerprints()
        return [
            {
                "name": file.path,
                "size": file.size,
                "rows": file.metadata.num_rows if file.metadata else 0,
                "fingerprint": self.fingerprints[file.path] if file.metadata else "left out",
            }
            for file in self.files
        ]

    def take_fingerprints(self) -> dict[str, str]:
        """`fingerprints`, with those of all files."""
        missing = [file.path for file in self.files if file.metadata and file.path not in self.fingerprints]

        def take_one(path: str) -> str:
            try:
                return artifact.fingerprint(path, self.filesystem)
            except OSError as error:
                raise InputError(f"{shown(self.filesystem, path)}: cannot be read: {first_line(error)}") from error

        if missing:
            with ThreadPoolExecutor(max_workers=min(16, len(missing))) as pool:
                self.fingerprints.update(zip(missing, pool.map(take_one, missing), strict=True))
        return self.fingerprints


def iter_row_groups(
    rows: ParquetSplit, columns: Sequence[str], places: Sequence[int] | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray | Jagged]]]:
    """(place in `rows.groups`, its columns) of these row groups, by default of all. A thread reads one row group
    ahead. A row group that cannot be read is skipped, if it may be.

    Raises:
        InputError: see `ParquetSplit.read`.
    """
    places = range(len(rows.groups)) if places is None else places
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="recpress-read") as pool:
        ahead = None
        for number, place in enumerate(places):
            data = (ahead or pool.submit(rows.read_or_skip, rows.groups[place], columns)).result()
            following = places[number + 1 : number + 2]
            ahead = pool.submit(rows.read_or_skip, rows.groups[following[0]], columns) if following else None
            if data is not None:
                yield place, data


def open_split(
    filesystem: pafs.FileSystem,
    paths: Sequence[str],
    required: Sequence[Column],
    optional: Sequence[Column] = (),
    *,
    skip: bool = False,
    bad: dict[str, str] | None = None,
    folders: str | None = None,
) -> ParquetSplit:
    """Reads the footers of the files, checks their columns and lists their row groups.

    Args:
        required: columns that every file must have.
        optional: columns to read if the files have them: all files or none.
        skip: a file whose footer cannot be read has no row groups, instead of being an error.
        bad: path -> what is wrong, of files to skip in any case; with `skip`, the bad files that are found are added.
        folders: names of folders below this one may hold values of columns (`recpress.data.dataset.partitions`).

    Raises:
        InputError: no file; a file is incomplete or not Parquet; a column is missing, of a wrong type, or of different
            types in the files (`schema.unify`).
    """
    if not paths:
        raise InputError("no Parquet file")
    bad = {} if bad is None else bad
    given = constants(sorted(paths), folders) if folders is not None else {}

    def open_one(path: str) -> SplitFile:
        if path not in bad:
            try:
                return open_file(filesystem, path, given.get(path))
            except InputError as error:
                if not skip:
                    raise
                bad[path] = str(error)
        return SplitFile(path, 0, None)

    with ThreadPoolExecutor(max_workers=min(16, len(paths))) as pool:
        files = tuple(pool.map(open_one, sorted(paths)))
    schemas = [(shown(filesystem, file.path), file.schema) for file in files if file.metadata]
    if not schemas:
        others = "" if len(files) == 1 else f"; none of the other {len(files) - 1} files can be used either"
        raise InputError(f"{bad[files[0].path]}{others}")
    there = {name for _, schema in schemas for name in schema.names}
    columns = unify([*required, *(column for column in optional if column.name in there)], schemas)
    return ParquetSplit(
        filesystem, files, groups_of(files), {column.name: column for column in columns}, folders=folders
    )


def groups_of(files: Sequence[SplitFile], first: int = 0) -> tuple[RowGroup, ...]:
    """The row groups that have rows, of the files from this ordinal on."""
    return tuple(
        RowGroup(ordinal, group, file.metadata.row_group(group).num_rows)
        for ordinal, file in enumerate(files)
        if ordinal >= first and file.metadata
        for group in range(file.metadata.num_row_groups)
        if file.metadata.row_group(group).num_rows
    )


def open_file(filesystem: pafs.FileSystem, path: str, given: Constants | None = None) -> SplitFile:
    """Reads the footer; `given` are values that the names of folders hold, for columns that the file lacks.

    Raises InputError if it cannot be read.
    """

    def read() -> SplitFile:
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            own = parquet.schema_arrow.names
            more = {name: value for name, value in (given or {}).items() if name not in own}
            return SplitFile(path, source.size(), parquet.metadata, more)

    where = shown(filesystem, path)
    try:
        return retried(filesystem, where, read)
    except (pa.ArrowException, OSError) as error:
        if "encrypt" in str(error).lower():
            raise InputError(f"{where}: encrypted; expected a Parquet file without encryption") from error
        remote = isinstance(error, OSError) and not isinstance(filesystem, pafs.LocalFileSystem)
        problem = "cannot be read" if remote else "incomplete or not a Parquet file"
        hint = "" if remote or path.endswith((".parquet", ".parq", ".pq")) else INGEST_HINT
        raise InputError(f"{where}: {problem}: {first_line(error)}{hint}") from error


def read_whole(filesystem: pafs.FileSystem, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of one Parquet file, of all columns or of those. Raises InputError if it cannot be read."""
    where = shown(filesystem, path)

    def read() -> pa.Table:
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
            table = parquet.read(columns=list(columns) if columns is not None else None)
        return plain_table(table)

    try:
        return retried(filesystem, where, read)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: cannot be read: {first_line(error)}") from error


def num_ids(rows: ParquetSplit, column: str) -> int:
    """The largest id of a column + 1, from the footers' statistics; row groups without any are read.

    Raises InputError if the column holds a null or a negative id, naming the row.
    """
    return largest_id(rows, column)[0] + 1


def largest_id(rows: ParquetSplit, column: str) -> tuple[int, RowGroup | None]:
    """The largest id of a column and its row group; (-1, None) without rows. Raises InputError as `num_ids`."""
    places = [
        leaves(file.metadata, [column])[0] if file.metadata and column not in file.constants else -1
        for file in rows.files
    ]
    largest, where = -1, None
    for group in rows.groups:
        file, stats = rows.files[group.file], None
        if column not in file.constants:
            stats = file.metadata.row_group(group.group).column(places[group.file]).statistics
        known = stats is not None and stats.has_min_max and stats.has_null_count
        if stats is not None and known and stats.min >= 0 and stats.null_count == 0:
            if stats.max > largest:
                largest, where = int(stats.max), group
            continue
        values = rows.read(group, [column])[column]  # raises, and names the row, if an id is bad
        flat = values.values if isinstance(values, Jagged) else values
        if len(flat) and int(flat.max()) > largest:
            largest, where = int(flat.max()), group
    return largest, where
