"""Raw rows -> rows of a log, by vocabularies that grow as the rows stream by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from recpress.data.config import IngestConfig, Schema
from recpress.data.errors import InputError
from recpress.data.log import SIDES, Log, Side, open_log
from recpress.data.rows import read_whole
from recpress.data.sources import Piece, Source
from recpress.data.vocabulary import Vocabulary
from recpress.data.writer import LogWriter


class Encoder:
    """Raw pieces -> rows of a log. Holds the vocabularies of users, items and categorical columns."""

    def __init__(self, schema: Schema, config: IngestConfig) -> None:
        self._schema = schema
        self._budget = config.memory_gib * 2**30
        self.sides: dict[Side, Vocabulary] = {}
        self._features: dict[str, Vocabulary] = {}
        self._old: Log | None = None
        if config.extend is not None:
            self._extend(open_log(config.extend, pairs=False))

    def _extend(self, log: Log) -> None:
        self._old = log
        if log.manifest is None or not (log.manifest.get("vocabularies") or log.manifest.get("features")):
            raise InputError(f"{log.path}: has no vocabularies; only a log that was ingested can be extended")
        for side in SIDES:
            if (table := log.vocabulary(side)) is not None:
                self.sides[side] = Vocabulary.from_table(table, side, budget=self._budget)
        for name, entry in log.manifest["features"].items():
            table = read_whole(log.filesystem, f"{log.root}/{entry['vocabulary']}")
            self._features[name] = Vocabulary.from_table(table, name, budget=self._budget)

    def encode(self, piece: Piece) -> pa.Table:
        """Dense ids and categories int64, labels and floats float32; dates as milliseconds since 1970."""
        columns: dict[str, pa.Array] = {}
        train = piece.part == "train"
        for side, name in zip(SIDES, ("user_id", "item_id"), strict=True):
            if name in piece.table.column_names:
                columns[name] = pa.array(self._ids(side, piece, piece.table.column(name), train))
        if self._schema.label:
            columns["label"] = piece.table.column("label").cast(pa.float32())
        if self._schema.time:
            columns["time"] = _time(piece.table.column("time"), piece.where)
        for name in self._schema.categorical:
            columns[name] = self._categories(name, piece.table.column(name), train, piece.where)
        for name in self._schema.floats:
            try:
                values = piece.table.column(name).cast(pa.float32(), safe=False)
            except pa.ArrowException as error:
                raise InputError(f"{piece.where}, column '{name}': {str(error).splitlines()[0]}") from error
            columns[name] = pc.fill_null(values, float("nan"))
        return pa.table(columns)

    def encode_negatives(self, piece: Piece) -> pa.Table:
        lists = piece.table.column("negatives").combine_chunks()
        negatives = self._ids("item", piece, lists.flatten(), False)
        users, items = (
            pa.array(self._ids(side, piece, piece.table.column(name), False))
            for side, name in zip(SIDES, ("user_id", "item_id"), strict=True)
        )
        return pa.table(
            {
                "user_id": users,
                "pos_item_id": items,
                "negatives": pa.ListArray.from_arrays(_offsets(lists), pa.array(negatives)),
            }
        )

    def _ids(self, side: Side, piece: Piece, values: pa.Array | pa.ChunkedArray, count: bool) -> np.ndarray:
        where = f"{piece.where}, column '{side}_id'"
        if side not in self.sides:
            kind = Vocabulary.kind_of(values.type, where)
            self.sides[side] = Vocabulary(kind, side, budget=self._budget)
        return self.sides[side].encode(values, count=count, where=where, first_row=piece.first_row)

    def _categories(self, name: str, column: pa.ChunkedArray, count: bool, where: str) -> pa.Array:
        """Dense categories of strings, integers, or lists of them. Missing is the category of the empty
        string."""
        if name not in self._features:
            self._features[name] = Vocabulary("string", name, budget=self._budget)
        vocabulary, where = self._features[name], f"{where}, column '{name}'"
        try:
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                lists = column.combine_chunks()
                values = vocabulary.encode(_text(lists.flatten()), count=count, where=where)
                return pa.ListArray.from_arrays(_offsets(lists), pa.array(values))
            return pa.array(vocabulary.encode(_text(column), count=count, where=where))
        except pa.ArrowException as error:
            raise InputError(f"{where}: type {column.type}; expected strings, integers or lists of them") from error

    def write_side_tables(self, source: Source, writer: LogWriter) -> None:
        """`users.parquet` and `items.parquet`, a row for each dense id; an id without features has missing
        ones."""
        for side, read in zip(SIDES, (source.users, source.items), strict=True):
            old = self._old.features(side) if self._old else None
            if read is None and old is None:
                continue
            size = len(self.sides[side])
            rows: list[pa.Table] = [] if old is None else [old]
            place = np.full(size, -1, dtype=np.int64)  # of each dense id in `rows`
            if old is not None:
                place[: old.num_rows] = np.arange(old.num_rows)
            if read is not None:
                raw = read()
                ids = self.sides[side].encode(raw.column("raw"), count=False, where=f"{side}s", grow=False)
                table = self._side_columns(raw.drop_columns("raw"))
                known = np.flatnonzero(ids >= 0)
                place[ids[known]] = known + (old.num_rows if old is not None else 0)
                rows.append(table)
            if rows[0].column_names != rows[-1].column_names:
                have, had = ", ".join(rows[-1].column_names), ", ".join(rows[0].column_names)
                raise InputError(f"side table of {side}s has columns {have}; those of the log to extend are {had}")
            table = pa.concat_tables([part.cast(rows[-1].schema) for part in rows])
            missing = self._side_columns(_missing(table)).cast(table.schema)
            place = np.where(place < 0, table.num_rows, place)
            writer.table(f"{side}s.parquet", pa.concat_tables([table, missing]).take(pa.array(place)))

    def _side_columns(self, table: pa.Table) -> pa.Table:
        columns = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            floats = pa.types.is_floating(column.type)
            columns[name] = (
                pc.fill_null(column.cast(pa.float32()), float("nan"))
                if floats
                else self._categories(name, column, True, "side table")
            )
        return pa.table(columns)

    def write_vocabularies(self, writer: LogWriter) -> None:
        for side, vocabulary in self.sides.items():
            writer.table(f"vocabulary/{side}.parquet", vocabulary.table())
        for name, vocabulary in self._features.items():
            writer.table(_feature_file(name), vocabulary.table())

    def manifest(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "vocabularies": {
                side: {"num_ids": len(vocabulary), "fingerprint": vocabulary.fingerprint()}
                for side, vocabulary in self.sides.items()
            },
            "features": {
                name: {"num_ids": len(vocabulary), "vocabulary": _feature_file(name)}
                for name, vocabulary in self._features.items()
            },
        }
        if self._old is not None:
            fingerprints = {side: self._old.vocabulary_fingerprint(side) for side in SIDES}
            entry["extends"] = {"log": self._old.path, "vocabularies": fingerprints}
        return entry


def _feature_file(name: str) -> str:
    return f"vocabulary/feature-{name.replace('/', '_')}.parquet"


def _time(time: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if pa.types.is_integer(time.type) or pa.types.is_floating(time.type):
        return time
    if not (pa.types.is_timestamp(time.type) or pa.types.is_date(time.type)):
        raise InputError(f"{where}: time has type {time.type}; expected numbers or dates")
    zone = time.type.tz if pa.types.is_timestamp(time.type) else None
    return time.cast(pa.timestamp("ms", zone), safe=False).cast(pa.int64())


def _text(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return pc.fill_null(values.cast(pa.large_string()), "")


def _offsets(lists: pa.Array) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())


def _missing(table: pa.Table) -> pa.Table:
    """One raw row whose every value is missing."""
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_floating(column.type):
            columns[name] = pa.array([None], pa.float32())
        elif pa.types.is_list(column.type):
            columns[name] = pa.array([[]], pa.list_(pa.string()))
        else:
            columns[name] = pa.array([None], pa.string())
    return pa.table(columns)
