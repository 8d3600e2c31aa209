"""Encodes raw rows as rows of a log, with vocabularies that grow while the rows are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recpress.data.config import IngestConfig
from recpress.data.dataset.columns import is_list
from recpress.data.dataset.log import SIDES, Log, Side, open_log
from recpress.data.dataset.parquet_split import read_whole
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.ingest import raw_values
from recpress.data.ingest.raw_files import RowNumbers
from recpress.data.ingest.raw_values import Times, plain
from recpress.data.ingest.sources import Piece, RawLog
from recpress.data.ingest.vocabulary import Vocabulary, grown

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_SUSPICIOUS = ("NA", "N/A", "NULL", "null", "NaN", "nan", "None", "\\N")
_AROUND = (
    (r"^[\s\x00]|[\s\x00]$", "spaces or zero bytes", ", which make them other ids than those without"),
    (r'^".*"$', "quotes", "; if these are not part of the ids: --quoting on"),
)
"""What may not be part of an id: a pattern, its name, and what the warning adds."""


class FinerTimes(Exception):
    """Times need a finer unit than the rows written so far; ingestion starts over with it."""

    def __init__(self, unit: str) -> None:
        super().__init__(unit)
        self.unit = unit


class Encoder:
    """Raw pieces -> rows of a log. Holds the vocabularies of users, items and categorical columns.

    Args:
        unit: of the times (`raw_values.Times.unit`), if an earlier attempt found it; default: that of the first rows.
    """

    def __init__(self, source: RawLog, config: IngestConfig, unit: str = "") -> None:
        self._source = source
        self._schema = source.schema
        self._config = config
        self._budget = config.memory_gib * 2**30
        self._nulls = config.null_values or raw_values.NULLS
        self._id_nulls = (*config.null_values, "")
        self.sides: dict[Side, Vocabulary] = {}
        self._features: dict[str, Vocabulary] = {}
        self._classes: dict[str, tuple[str, str]] = {}  # column -> class of its ids, and the first file with it
        self._strict = source.integer_ids
        self._unit = unit
        self._epochs: dict[str, dict[int, tuple[RowNumbers, int]]] = {}  # file -> magnitude of a time -> its first row
        self._zone = ("", "")  # of times: `Times.zone`, and the first file with it
        self._old: Log | None = None
        self._extended: set[Side] = set()  # sides with the vocabulary of another log, whose kind does not change
        self._same = _shared(config, source)  # column -> the column whose vocabulary it shares
        self._counts: dict[str, np.ndarray] = {name: np.zeros(0, dtype=np.int64) for name in self._same}
        if config.extend is not None:
            self._extend(open_log(config.extend, pairs=False))

    def _extend(self, log: Log) -> None:
        self._old = log
        if log.manifest is None or not (log.manifest.get("vocabularies") or log.manifest.get("features")):
            raise InputError(f"{log.path}: has no vocabularies; expected a log that `recpress ingest` wrote")
        for side in SIDES:
            if (table := log.vocabulary(side)) is not None:
                self.sides[side] = Vocabulary.from_table(table, side, budget=self._budget)
                self._extended.add(side)
                kind = self.sides[side].kind
                if self._config.id_type not in ("auto", kind):
                    raise InputError(
                        f"id_type is '{self._config.id_type}', but ids of {side}s in {log.path} are of kind '{kind}'; "
                        "expected the same, or 'auto'"
                    )
        for name, entry in log.manifest["features"].items():
            owner, same = entry.get("same"), self._same.get(name)
            if same not in (None, owner) or (owner and name in self._same.values()):
                has = f"shares the vocabulary of '{owner}'" if owner else "has its own vocabulary"
                raise InputError(
                    f"same: column '{name}' {has} in {log.path}, which is extended; expected the same here"
                )
            table = read_whole(log.filesystem, f"{log.root}/{entry['vocabulary']}")
            if owner:
                self._same[name] = owner
                self._counts[name] = table.column("count").to_numpy().astype(np.int64)
            else:
                self._features[name] = Vocabulary.from_table(table, name, budget=self._budget)

    def encode(self, piece: Piece) -> Iterator[tuple[str, pa.Table]]:
        """Parts and their rows: dense ids and categories int64, labels and floats float32, times int64, float64 or
        timestamps.

        Raises:
            InputError: a value is missing, of a wrong type or out of range; times or ids of two kinds.
            FinerTimes: times need a finer unit than the earlier ones.
        """
        if not piece.table.num_rows:  # a writer without rows may not know the types
            return
        raw = {name: plain(piece.table.column(name)) for name in piece.table.column_names}
        at = piece.rows
        self._check_missing(raw, piece)
        parts = _parts(raw.pop("split"), piece, self._source.names.get("split", "split")) if "split" in raw else None
        columns: dict[str, pa.Array] = {}
        for side, name in zip(SIDES, ("user_id", "item_id"), strict=True):
            if name in raw:
                columns[name] = self._raw_ids(side, raw[name], piece, name)
        if self._schema.label:
            columns["label"] = raw_values.floats(raw["label"], self._where(piece, "label"), at, self._nulls)
        if self._schema.time:
            where = self._where(piece, "time")
            columns["time"] = self._times(raw_values.times(raw["time"], where, at), where, at)
        for name in self._schema.floats:
            columns[name] = raw_values.floats(raw[name], f"{piece.where}, column '{name}'", at, self._nulls)
        columns |= {name: self._raw_categories(name, raw[name], piece) for name in self._schema.categorical}
        rows = pa.table(columns)
        if parts is None:
            yield piece.part, self._dense(rows, piece.part, piece.where)
            return
        for part in ("train", "val", "test"):
            chosen = rows.filter(pa.array(parts == part))
            if chosen.num_rows:
                yield part, self._dense(chosen, part, piece.where)

    def _dense(self, rows: pa.Table, part: str, where: str) -> pa.Table:
        """The rows with dense ids and categories. Only rows of train are counted."""
        train = part == "train"
        columns = {}
        for name, column in zip(rows.column_names, rows.columns, strict=True):
            if name in self._schema.categorical:
                columns[name] = self._categories(name, plain(column), train, where)
            elif name in ("user_id", "item_id"):
                side = SIDES[("user_id", "item_id").index(name)]
                columns[name] = pa.array(self.sides[side].encode(column, count=train, where=where))
            else:
                columns[name] = column
        return pa.table(columns)

    def encode_negatives(self, piece: Piece) -> pa.Table:
        lists = piece.table.column("negatives").combine_chunks()
        owner = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
        items = self._raw_ids("item", plain(lists.flatten()), replace(piece, rows=piece.rows.each(owner)), "item_id")
        users, held_out = (
            pa.array(self._encode(side, self._raw_ids(side, plain(piece.table.column(name)), piece, name), piece))
            for side, name in zip(SIDES, ("user_id", "item_id"), strict=True)
        )
        negatives = pa.array(self._encode("item", items, piece))
        return pa.table(
            {
                "user_id": users,
                "pos_item_id": held_out,
                "negatives": pa.ListArray.from_arrays(_offsets(lists), negatives),
            }
        )

    def _encode(self, side: Side, values: pa.Array, piece: Piece) -> np.ndarray:
        return self.sides[side].encode(values, count=False, where=piece.where)

    def _check_missing(self, raw: dict[str, pa.Array], piece: Piece) -> None:
        for name in ("user_id", "item_id", "label", "time"):
            if name in raw:
                gone = raw_values.missing(raw[name], self._id_nulls if name.endswith("_id") else self._nulls)
                if gone.any():
                    column = self._source.names.get(name, name)
                    named = name if column == name else f"{name} (column '{column}')"
                    raise InputError(f"{piece.where}, {piece.rows.name(int(np.argmax(gone)))}: no {named}")

    def _where(self, piece: Piece, name: str) -> str:
        """A column, as errors name it: the file, and its name in the file."""
        return f"{piece.where}, column '{self._source.names.get(name, name)}'"

    def _raw_ids(self, side: Side, array: pa.Array, piece: Piece, name: str) -> pa.Array:
        """Ids of a column in the type of the side's vocabulary, which is created, or becomes one of strings, if
        necessary."""
        where = self._where(piece, name)
        if (found := raw_values.class_of(array)) is None:
            raise InputError(
                f"{where}: type {array.type}; expected strings, integers, or other values that can be compared"
            )
        if found != "none":
            known, seen = self._classes.setdefault(side, (found, where))
            if found != known:
                raise InputError(
                    f"{where}: ids are of type {found}, those in {seen} of type {known}; expected one type"
                )
        loose = name in self._source.untyped or found == "number"
        values = raw_values.ids(array, where, piece.rows)
        if side not in self.sides:
            fixed = self._config.id_type if self._config.id_type != "auto" else "int" if self._strict else None
            integers = values if pa.types.is_int64(values.type) else raw_values.integer_text(values) if loose else None
            kind = fixed or ("string" if integers is None else "int")
            if kind == "string" and name in self._source.untyped and not fixed:
                raw_values.refuse_mixed_floats(values, where, piece.rows, integers=False)
            self.sides[side] = Vocabulary(kind, side, budget=self._budget)
        vocabulary = self.sides[side]
        if vocabulary.kind == "int" and pa.types.is_large_string(values.type):
            integers = raw_values.integer_text(values)
            if integers is not None:
                return integers
            if self._config.id_type == "auto" and not self._strict and side not in self._extended:
                raw_values.refuse_mixed_floats(values, where, piece.rows, integers=True)
                vocabulary.become_strings()
            elif self._config.id_type != "int":
                raw_values.refuse_other_integers(values, where, piece.rows)
        return vocabulary.fit(values, where=where, rows=piece.rows)

    def _times(self, found: Times, where: str, rows: RowNumbers) -> pa.Array:
        zone, seen = self._zone
        if zone and found.zone != zone:
            raise InputError(
                f"{where}: {_TIMES[found.zone]}, but {_TIMES[zone]} in {seen}; expected one kind in all files, "
                "because their units may differ"
            )
        self._zone = (found.zone, seen or where)
        if found.zone == "number":
            known = self._epochs.setdefault(where, {})
            for magnitude, place in raw_values.magnitudes(found.values).items():
                known.setdefault(magnitude, (rows, place))
        unit = raw_values.finer(self._unit, found.unit) if self._unit else found.unit
        if self._unit and unit != self._unit:
            raise FinerTimes(unit)
        self._unit = unit
        return raw_values.in_unit(found, unit, where)

    def check_epochs(self) -> None:
        """Raises InputError if times look like seconds, say, and others like milliseconds: in one file without a time
        between them, or all times of one file and all of another."""
        seen: dict[int, str] = {}
        for where, found in self._epochs.items():
            units = sorted(found.keys() & raw_values.EPOCHS.keys())
            for one, other in itertools.pairwise(units):
                if not any(one < magnitude < other for magnitude in found):
                    (rows, place), (rows_2, place_2) = found[one], found[other]
                    raise InputError(
                        f"{where}: times look like {raw_values.EPOCHS[one]} since 1970 in {rows.name(place)}, but like "
                        f"{raw_values.EPOCHS[other]} in {rows_2.name(place_2)}; expected one unit in all rows"
                    )
            if units and len(found) == 1:
                seen.setdefault(units[0], where)
        if len(seen) > 1:
            (one, at), (other, there), *_ = seen.items()
            raise InputError(
                f"{there}: times look like {raw_values.EPOCHS[other]} since 1970, but like {raw_values.EPOCHS[one]} in "
                f"{at}; expected one unit in all files"
            )

    def _raw_categories(self, name: str, array: pa.Array, piece: Piece) -> pa.Array:
        """Raw values, or lists of them; those of a column that shares the vocabulary of a side as that holds them."""
        side = _side_of(self._same.get(name, name))
        if side is None:
            return self._without_nulls(array)
        in_lists = is_list(array.type)
        values = plain(array.flatten()) if in_lists else array
        if in_lists:
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            piece = replace(piece, rows=piece.rows.each(np.repeat(np.arange(len(array)), lengths)))
        gone = raw_values.missing(values, self._id_nulls)
        if gone.any():
            raise InputError(
                f"{self._where(piece, name)}, {piece.rows.name(int(np.argmax(gone)))}: no id; expected one, because "
                f"the column shares the vocabulary of {side}s (an empty list has none)"
            )
        ids = self._raw_ids(side, values, piece, name)
        return pa.ListArray.from_arrays(_offsets(array), ids) if in_lists else ids

    def _without_nulls(self, array: pa.Array) -> pa.Array:
        if self._config.null_values and pa.types.is_large_string(array.type):
            gone = pc.is_in(array, value_set=pa.array(list(self._config.null_values), array.type))
            return pc.if_else(gone, pa.scalar("", array.type), array)
        return array

    def _categories(self, name: str, array: pa.Array, count: bool, where: str) -> pa.Array:
        """Dense categories of a plain array of strings, integers, or lists of them. A missing value has the category of
        the empty string."""
        where = f"{where}, column '{name}'"
        try:
            if is_list(array.type):
                values = self._numbered(name, plain(array.flatten()), count, where)
                return pa.ListArray.from_arrays(_offsets(array), pa.array(values))
            return pa.array(self._numbered(name, array, count, where))
        except pa.ArrowException as error:
            raise InputError(f"{where}: type {array.type}; expected strings, integers or lists of them") from error

    def _numbered(self, name: str, values: pa.Array, count: bool, where: str) -> np.ndarray:
        owner = self._same.get(name, name)
        if (side := _side_of(owner)) is not None:
            ids = self.sides[side].encode(values, count=False, where=where)
        else:
            if owner not in self._features:
                self._features[owner] = Vocabulary("string", owner, budget=self._budget)
            ids = self._features[owner].encode(_text(values), count=count and owner == name, where=where)
        if count and owner != name:
            size = int(ids.max(initial=-1)) + 1
            self._counts[name] = grown(self._counts[name], size)
            np.add.at(self._counts[name], ids, 1)
        return ids

    def suspicious(self) -> list[str]:
        """Warnings of ids such as `NULL`, which may mean a missing id, and of spaces and quotes around ids."""
        texts = {side: vocabulary for side, vocabulary in self.sides.items() if vocabulary.kind == "string"}
        odd = [
            f"{count:,} {side}s have {what} around their ids, such as {first!r}{fix}"
            for side, vocabulary in texts.items()
            for pattern, what, fix in _AROUND
            for count, first in [vocabulary.matching(pattern)]
            if count
        ]
        return odd + [
            f"{row['count']:,} rows of train have the {side} {row['raw']!r}; if it means a missing id: --null-values"
            for side, vocabulary in texts.items()
            for row in vocabulary.rows_of(_SUSPICIOUS)
        ]

    def write_side_tables(self, source: RawLog, writer: LogWriter) -> None:
        """`users.parquet` and `items.parquet`, one row per dense id; an id without features has missing values."""
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
                ids = self.sides[side].find(plain(raw.column("raw")))
                _refuse_twice(raw.column("raw"), f"side table of {side}s")
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
                else self._categories(name, plain(column), True, "side table")
            )
        return pa.table(columns)

    def write_vocabularies(self, writer: LogWriter) -> None:
        for side, vocabulary in self.sides.items():
            writer.table(f"vocabulary/{side}.parquet", vocabulary.table())
        for name, vocabulary in self._features.items():
            writer.table(_feature_file(name), vocabulary.table())
        for name in self._same:
            vocabulary = self._owner(name)
            counts = grown(self._counts[name], len(vocabulary))[: len(vocabulary)]
            writer.table(_feature_file(name), vocabulary.table(counts))

    def _owner(self, name: str) -> Vocabulary:
        """The vocabulary that a column shares."""
        owner = self._same[name]
        side = _side_of(owner)
        return self._features[owner] if side is None else self.sides[side]

    def manifest(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "vocabularies": {
                side: {"num_ids": len(vocabulary), "fingerprint": vocabulary.fingerprint()}
                for side, vocabulary in self.sides.items()
            },
            "features": {
                name: {
                    "num_ids": len(vocabulary),
                    "vocabulary": _feature_file(name),
                    "fingerprint": vocabulary.fingerprint(),
                }
                for name, vocabulary in self._features.items()
            }
            | {
                name: {
                    "num_ids": len(self._owner(name)),
                    "vocabulary": _feature_file(name),
                    "fingerprint": self._owner(name).fingerprint(),
                    "same": owner,
                }
                for name, owner in self._same.items()
            },
        }
        if self._old is not None:
            fingerprints = {side: self._old.vocabulary_fingerprint(side) for side in SIDES}
            entry["extends"] = {"log": self._old.path, "vocabularies": fingerprints}
        return entry


_TIMES = {"number": "numbers", "local": "dates without a time zone", "UTC": "times with a time zone"}


def _side_of(column: str) -> Side | None:
    """The side whose ids a column of the log has."""
    return {"user_id": SIDES[0], "item_id": SIDES[1]}.get(column)


def _shared(config: IngestConfig, source: RawLog) -> dict[str, str]:
    """Column -> the column whose vocabulary it shares, by `same`: the user or item of the group, else the first.

    Raises:
        InputError: a group of fewer than two columns, a column without ids or in two groups, users and items in one.
    """
    schema = source.schema
    columns = {source.names.get(name, name): name for name in (schema.user, schema.item, *schema.categorical) if name}
    shared: dict[str, str] = {}
    for group in config.same:
        names = [name.strip() for name in group.split("=")]
        if len(names) < 2:
            raise InputError(f"same is '{group}'; expected COLUMN=COLUMN, as item_id=history")
        for name in names:
            if name not in columns:
                raise InputError(
                    f"same is '{group}': no column '{name}' with ids; expected the user, the item or categorical "
                    f"columns: {', '.join(columns)}"
                )
            if names.count(name) > 1 or columns[name] in (*shared, *shared.values()):
                raise InputError(f"same: column '{name}' is named twice; expected one group with all of its columns")
        of_sides = [name for name in names if _side_of(columns[name])]
        if len(of_sides) > 1:
            raise InputError(f"same is '{group}': users and items cannot share a vocabulary")
        owner = (of_sides or names)[0]
        shared |= {columns[name]: columns[owner] for name in names if name != owner}
    return shared


def _feature_file(name: str) -> str:
    return f"vocabulary/feature-{name.replace('%', '%25').replace('/', '%2F')}.parquet"


def _refuse_twice(raw: pa.ChunkedArray, where: str) -> None:
    counts = pc.value_counts(raw)
    if len(counts) < len(raw):
        row = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
        raise InputError(f"{where}: the id {counts.field('values')[row].as_py()!r} occurs twice; expected each once")


def _parts(split: pa.Array, piece: Piece, column: str) -> np.ndarray:
    """`train`, `val` or `test` of each row."""
    if not pa.types.is_large_string(split.type):
        raise InputError(f"{piece.where}, column '{column}': type {split.type}; expected strings")
    names = [PARTS.get((name or "").strip().lower(), "") for name in split.to_pylist()]
    if "" in names:
        row = names.index("")
        raise InputError(
            f"{piece.where}, {piece.rows.name(row)}: split {split[row].as_py()!r} (column '{column}'); expected "
            "train, val or test"
        )
    return np.array(names)


def _text(values: pa.Array) -> pa.Array:
    return pc.fill_null(raw_values.text(values), "")


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
