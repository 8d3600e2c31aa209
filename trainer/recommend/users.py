"""The users of a run: all of a log, or those of a file of raw ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recpress.data.dataset.artifact import MANIFEST
from recpress.data.dataset.files import first_line, retried, shown
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.data.ingest import raw_values
from recpress.data.ingest.raw_files import RawFile, RowNumbers, has_suffix, open_input
from recpress.data.ingest.raw_text import Dialect, choose_delimiter, header, read_delimited

T = TypeVar("T")

PARQUET = (".parquet", ".parq", ".pq")
TEXT = (".csv", ".tsv", ".tab")  # also compressed


@dataclass(frozen=True)
class Users:
    """Users in the order of the output."""

    raw_ids: RawIds
    dense: np.ndarray | None = None
    """Dense ids, (n,) int64, distinct; None: all of the log."""
    unknown: pa.Array | None = None
    """Raw ids that are not in the log."""
    facts: dict[str, int] = field(default_factory=dict)
    """Counts for the manifest."""

    def __len__(self) -> int:
        return self.raw_ids.num_ids if self.dense is None else len(self.dense)

    def dense_ids(self, start: int, stop: int) -> np.ndarray:
        """Dense ids of the users [start, stop)."""
        return np.arange(start, stop) if self.dense is None else self.dense[start:stop]

    def raw(self, start: int, stop: int) -> pa.Array:
        """Raw ids of the users [start, stop)."""
        if self.dense is None:
            return self.raw_ids.slice(start, stop)
        return self._given.slice(start, stop - start)

    @cached_property
    def _given(self) -> pa.Array:
        assert self.dense is not None
        return self.raw_ids.take(self.dense)

    def positions(self, dense: np.ndarray) -> np.ndarray:
        """Position of each dense id among the users, -1 if it is not one of them."""
        if self.dense is None:
            return dense
        place = np.searchsorted(self._sorted[0], dense)
        place[place == len(self)] = 0
        return np.where(self._sorted[0][place] == dense, self._sorted[1][place], -1)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.dense is not None
        order = np.argsort(self.dense)
        return self.dense[order], order

    @property
    def fingerprint(self) -> str:
        """Equal for the same users in the same order."""
        if self.dense is None:
            return f"all {len(self)} users of the log"
        digest = hashlib.sha256(self.dense.astype("<i8").tobytes())
        digest.update(str(self.unknown.to_pylist() if self.unknown is not None else []).encode())
        return digest.hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        """Memory of the ids: of a file of users, all of them; of a log, one row group of its vocabulary."""
        if self.dense is None:
            return self.raw_ids.largest_group_bytes
        unknown = self.unknown.nbytes if self.unknown is not None else 0
        return self._given.nbytes + 3 * self.dense.nbytes + unknown


class RawIds:
    """The raw user ids of a log by dense id, read a row group at a time; dense ids if the log has no others."""

    def __init__(self, log: Log) -> None:
        self.num_ids = log.num_users
        self.column = log.schema.user
        self._group: tuple[int, pa.Array] | None = None
        self._filesystem = log.filesystem
        self._path: str | None = None
        self.type = pa.int64()
        self._starts = np.array([0, self.num_ids])
        self.largest_group_bytes = 0
        if log.manifest is not None and "user" in log.manifest.get("vocabularies", {}):
            self._path = f"{log.root}/vocabulary/user.parquet"
            footer = self._read(lambda file: file.metadata)
            if footer.num_rows != self.num_ids:
                raise InputError(f"{self._path}: {footer.num_rows} rows, expected one for each of {self.num_ids} users")
            self.type = self._read(lambda file: file.schema_arrow.field("raw").type)
            groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
            self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
            self.largest_group_bytes = 2 * max((group.total_byte_size for group in groups), default=0)

    def groups(self) -> Iterator[tuple[int, pa.Array]]:
        """(first dense id, raw ids) of each row group."""
        for group in range(len(self._starts) - 1):
            yield int(self._starts[group]), self._of_group(group)

    def slice(self, start: int, stop: int) -> pa.Array:
        """Raw ids of the dense ids [start, stop)."""
        parts = []
        group = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first, last = int(self._starts[group]), min(int(self._starts[group + 1]), stop)
            if last > start:
                parts.append(self._of_group(group).slice(start - first, last - start))
                start = last
            group += 1
        return pa.concat_arrays(parts) if parts else pa.array([], self.type)

    def take(self, dense: np.ndarray) -> pa.Array:
        """Raw ids of these dense ids."""
        parts, order = [], np.argsort(dense, kind="stable")
        bounds = np.searchsorted(dense[order], self._starts)
        for group in range(len(self._starts) - 1):
            if bounds[group] < bounds[group + 1]:
                inside = dense[order[bounds[group] : bounds[group + 1]]] - self._starts[group]
                parts.append(self._of_group(group).take(pa.array(inside)))
        if not parts:
            return pa.array([], self.type)
        return pa.concat_arrays(parts).take(pa.array(np.argsort(order, kind="stable")))

    def _of_group(self, group: int) -> pa.Array:
        if self._path is None:
            return pa.array(np.arange(self.num_ids))
        if self._group is None or self._group[0] != group:
            table = self._read(lambda file: file.read_row_group(group, columns=["raw"]))
            self._group = group, table.column("raw").combine_chunks()
        return self._group[1]

    def _read(self, read: Callable[[pq.ParquetFile], T]) -> T:
        where = shown(self._filesystem, str(self._path))

        def call() -> T:
            with self._filesystem.open_input_file(self._path) as source, pq.ParquetFile(source) as file:
                return read(file)

        try:
            return retried(self._filesystem, where, call)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InputError(f"{where}: cannot be read: {first_line(error)}") from error


def all_users(log: Log) -> Users:
    """All users of a log."""
    return Users(RawIds(log), facts={"given": log.num_users})


def users_of_files(path: str, files: Sequence[RawFile], log: Log, *, skip: bool) -> Users:
    """The users that files name by raw ids, each once, in the order of the files.

    Args:
        path: what the user gave, for errors.
        files: Parquet, CSV or TSV with a header. The ids are in its only column, or in the one that has the name of the
            log's user column.
        skip: leave out users that are not in the log, instead of raising.

    Raises:
        InputError: the file cannot be read, has no users or an id that is null or of another type; a user is not in the
            log; no user is.
    """
    raw_ids = RawIds(log)
    values, headers = _read_ids(path, files, raw_ids)
    if len(values) == 0:
        raise InputError(f"{path}: no users; expected at least one")
    distinct = values.unique()
    dense = np.full(len(distinct), -1, dtype=np.int64)
    for first, raw in raw_ids.groups():
        if headers is not None and pc.any(pc.is_in(headers, raw)).as_py():
            raise InputError(f"{path}: its first line has a user id, expected a header such as '{raw_ids.column}'")
        found = pc.index_in(raw, distinct)
        here = pc.is_valid(found).to_numpy(zero_copy_only=False)
        dense[found.drop_null().to_numpy()] = first + np.flatnonzero(here)
    known = dense >= 0
    facts = {"given": len(values), "repeated": len(values) - len(distinct), "unknown": int(np.sum(~known))}
    unknown = distinct.filter(pa.array(~known))
    if not known.any():
        raise InputError(
            f"{path}: none of its {len(distinct):,} users is in {log.path}, such as {unknown[0].as_py()!r}"
        )
    if len(unknown) and not skip:
        raise InputError(
            f"{path}: {len(unknown):,} of its {len(distinct):,} users are not in {log.path}, such as "
            f"{unknown[0].as_py()!r}; to recommend to the others: --on-unknown skip"
        )
    return Users(raw_ids, dense[known], unknown, facts)


def files_of_users(path: str, item: str) -> list[RawFile] | None:
    """The files of users that `path` names; None if it is a log, which a folder is if it has a manifest or parts, or if
    its Parquet files have the column `item`.

    Raises InputError for a file that is neither Parquet nor text with columns.
    """
    place = open_input(path)
    if not place.is_folder:
        named = has_suffix(path, (*PARQUET, *TEXT))
        if named or not place.files():
            return list(place.files().values()) if named else None
        raise InputError(f"{path}: expected users in Parquet or text ({', '.join((*PARQUET, *TEXT))}), or a log")
    files = [file for name, file in place.files().items() if has_suffix(name, (*PARQUET, *TEXT))]
    if not files or MANIFEST in place.files() or (_is_parquet(files[0]) and item in _open_parquet(files[0], _names)):
        return None
    return files


def _is_parquet(file: RawFile) -> bool:
    return file.path.lower().endswith(PARQUET)


def _open_parquet(file: RawFile, read: Callable[[pq.ParquetFile], T]) -> T:
    def call() -> T:
        with file.filesystem.open_input_file(file.path) as source, pq.ParquetFile(source) as reader:
            return read(reader)

    try:
        return retried(file.filesystem, file.where, call)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.where}: cannot be read: {first_line(error)}") from error


def _names(reader: pq.ParquetFile) -> list[str]:
    return list(reader.schema_arrow.names)


def _read_ids(path: str, files: Sequence[RawFile], raw_ids: RawIds) -> tuple[pa.Array, pa.Array | None]:
    """(ids, headers of text files that could be ids)."""
    if not files:
        raise InputError(f"{path}: no such file")
    parts, headers = [], []
    for file in files:
        if _is_parquet(file):
            parts.append(_ids_of_parquet(file, raw_ids))
        else:
            ids, header = _ids_of_text(file, raw_ids)
            parts.append(ids)
            headers.append(header)
    try:
        return pa.concat_arrays(parts), pa.array(headers, pa.string()).cast(raw_ids.type) if headers else None
    except pa.ArrowInvalid:  # names are no integers
        return pa.concat_arrays(parts), None


def _ids_of_parquet(file: RawFile, raw_ids: RawIds) -> pa.Array:
    name = _column(_open_parquet(file, _names), file.where, raw_ids.column)
    column = _open_parquet(file, lambda reader: reader.read(columns=[name]).column(name))
    return _checked(raw_values.plain(column), file.where, name, RowNumbers(), raw_ids)


def _ids_of_text(file: RawFile, raw_ids: RawIds) -> tuple[pa.Array, str]:
    """(ids, name of their column). All columns are read as strings: `007` is not `7`."""
    dialect = Dialect(delimiter="\t" if has_suffix(file.path, (".tsv", ".tab")) else ",")
    dialect = choose_delimiter(file, dialect, [raw_ids.column])
    name = _column([name.strip() for name in header(file, dialect)], file.where, raw_ids.column)
    parts = [
        _checked(raw_values.plain(table.column(name)), file.where, name, rows, raw_ids)
        for rows, table in read_delimited(file, dialect, [name])
    ]
    return pa.concat_arrays([*parts, pa.array([], raw_ids.type)]), name


def _column(names: list[str], where: str, wanted: str) -> str:
    if len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    raise InputError(
        f"{where}: columns {', '.join(names[:8])}; expected a single column of raw user ids, or one named '{wanted}'"
    )


def _checked(values: pa.Array, where: str, name: str, rows: RowNumbers, raw_ids: RawIds) -> pa.Array:
    """The ids in the type of the log's. Raises InputError if one is missing, or is not an id of that type."""
    where = f"{where}, column '{name}'"
    gone = raw_values.missing(values)
    if gone.any():
        raise InputError(f"{where}, {rows.name(int(np.argmax(gone)))}: null; expected a raw user id")
    if raw_values.class_of(values) is None:
        raise InputError(f"{where}: type {values.type}; expected integers or strings")
    try:
        return raw_values.ids(values, where, rows).cast(raw_ids.type)
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: does not have ids of type {raw_ids.type}, as the log has: {first_line(error)}"
        ) from error
