"""The users of a run: all of a log, or those of a file of raw ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from recpress.data.dataset.files import expand, first_line, resolve, retried, shown
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError

T = TypeVar("T")

PARQUET = (".parquet", ".parq", ".pq")
TEXT = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_MOST_COLUMNS = 1000  # of a text file


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


def users_of_file(path: str, log: Log, *, skip: bool) -> Users:
    """The users that a file names by raw ids, each once, in the order of the file.

    Args:
        path: Parquet, CSV or TSV with a header; a glob reads several files. The ids are in its only column, or in the
            one that has the name of the log's user column.
        skip: leave out users that are not in the log, instead of raising.

    Raises:
        InputError: the file cannot be read, has no users or an id that is null or of another type; a user is not in the
            log; no user is.
    """
    raw_ids = RawIds(log)
    values, headers = _read_ids(path, raw_ids)
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


def is_file_of_users(path: str) -> bool:
    """Whether it is a file or a glob, and not the folder of a log."""
    return path.lower().endswith((*PARQUET, *TEXT))


def _read_ids(path: str, raw_ids: RawIds) -> tuple[pa.Array, pa.Array | None]:
    """(ids, headers of text files that could be ids)."""
    filesystem, inner = resolve(path)
    files = expand(filesystem, inner)
    if not files:
        raise InputError(f"{path}: no such file")
    parts, headers = [], []
    for file in files:
        where = shown(filesystem, file)

        def read(file: str = file, where: str = where) -> tuple[pa.Array, str | None]:
            with filesystem.open_input_file(file) as source:
                if file.lower().endswith(PARQUET):
                    return _ids_of_parquet(source, where, raw_ids), None
                return _ids_of_text(source, where, raw_ids)

        try:
            ids, header = retried(filesystem, where, read)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{where}: cannot be read: {first_line(error)}") from error
        parts.append(ids)
        if header is not None:
            headers.append(header)
    try:
        return pa.concat_arrays(parts), pa.array(headers, pa.string()).cast(raw_ids.type) if headers else None
    except pa.ArrowInvalid:  # names are no integers
        return pa.concat_arrays(parts), None


def _ids_of_parquet(source: pa.NativeFile, where: str, raw_ids: RawIds) -> pa.Array:
    with pq.ParquetFile(source) as file:
        name = _column(file.schema_arrow.names, where, raw_ids.column)
        column = file.read(columns=[name]).column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise InputError(f"{where}: column '{name}' has type {column.type}, expected integers or strings")
    return _checked(column, where, name, raw_ids)


def _ids_of_text(source: pa.NativeFile, where: str, raw_ids: RawIds) -> tuple[pa.Array, str]:
    """(ids, name of their column). All columns are read as strings: `007` is an id of its own."""
    if where.lower().endswith(".gz"):
        source = pa.CompressedInputStream(source, "gzip")
    table = pacsv.read_csv(
        source,
        read_options=pacsv.ReadOptions(autogenerate_column_names=True),
        parse_options=pacsv.ParseOptions(delimiter="\t" if ".tsv" in where.lower() else ","),
        convert_options=pacsv.ConvertOptions(column_types={f"f{k}": pa.string() for k in range(_MOST_COLUMNS)}),
    )
    names = [str(column[0].as_py()) for column in table.columns]
    name = _column(names, where, raw_ids.column)
    return _checked(table.column(names.index(name)).slice(1), where, name, raw_ids), name


def _column(names: list[str], where: str, wanted: str) -> str:
    if len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    raise InputError(
        f"{where}: columns {', '.join(names[:8])}; expected a single column of raw user ids, or one named '{wanted}'"
    )


def _checked(column: pa.ChunkedArray, where: str, name: str, raw_ids: RawIds) -> pa.Array:
    if column.null_count:
        row = int(np.flatnonzero(pc.is_null(column).to_numpy())[0])
        raise InputError(f"{where}, row {row}: null in column '{name}', expected a raw user id")
    try:
        column = column.cast(raw_ids.type)
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: column '{name}' does not have ids of type {raw_ids.type}, as the log has: {first_line(error)}"
        ) from error
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
