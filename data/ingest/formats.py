"""Readers of the formats of public data sets: MovieLens, the NCF triple, LightGCN, Criteo."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recpress.data.config import IngestConfig, Schema
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RawFile, RawInput, RowNumbers, plain_name
from recpress.data.ingest.raw_text import Dialect, first_lines, header, listed, read_delimited, read_lines
from recpress.data.ingest.sources import Piece, RawLog, dialect_of

INTS = [f"I{place}" for place in range(1, 14)]
CATEGORIES = [f"C{place}" for place in range(1, 27)]
RATINGS = ("ratings.dat", "ratings.csv", "u.data")
MOVIELENS_TABLES = ("movies.csv", "tags.csv", "links.csv", "genome-scores.csv", "genome-tags.csv")
"""Further files of MovieLens, next to ratings.csv."""
LIGHTGCN = {
    "train.txt": "train",
    "val.txt": "val",
    "valid.txt": "val",
    "test.txt": "test",
}
_EVENT = ("user_id", "item_id", "label", "time")
_MOVIELENS = ("userId", "movieId", "rating", "timestamp")  # of ratings.csv
_PAIR = Schema(label="label", time="time")
_UNTYPED = frozenset(("user_id", "item_id", "label", "time"))


def movielens(config: IngestConfig, place: RawInput) -> RawLog:
    """`u.data` (100K), `ratings.dat` (1M, 10M) or `ratings.csv` (20M and later), with users.dat, movies.dat or
    movies.csv next to it; for the 100K set only the ratings.

    Ratings become labels. Side tables: gender, age and occupation of users; genres (a list) and year of
    items.
    """
    _, files = place.home(lambda name: plain_name(name) in RATINGS)
    by_name = {plain_name(name): file for name, file in files.items()}
    given = place.path.rpartition("/")[2]
    found = [name for name in RATINGS if name in by_name]
    if not place.is_folder:
        found = [name for name in found if files.get(given) == by_name[name]]
    if not found:
        raise InputError(f"{place.name}: no ratings.dat, ratings.csv or u.data")
    if len(found) > 1:
        raise InputError(f"{place.name}: {' and '.join(found)}; name the one to read")
    file = by_name[found[0]]

    def pieces() -> Iterator[Piece]:
        if found[0] == "ratings.dat":  # `::` is two delimiters with an empty field between them
            fields = ["user_id", "a", "item_id", "b", "label", "c", "time"]
            for rows, table in read_delimited(file, dialect_of(config, ":", quoted=False), fields, fields):
                for name in "abc":
                    filled = pc.not_equal(table.column(name), "")
                    if pc.any(filled).as_py():
                        line = rows.name(pc.index(filled, True).as_py())
                        raise InputError(f"{file.where}, {line}: expected user::item::rating::time")
                yield Piece("train", file.where, rows, table.select(_EVENT))
        elif found[0] == "u.data":
            for rows, table in read_delimited(file, dialect_of(config, "\t", quoted=False), _EVENT, _EVENT):
                yield Piece("train", file.where, rows, table)
        else:
            dialect = dialect_of(config, ",", quoted=True)
            names = header(file, dialect)
            if missing := [name for name in _MOVIELENS if name not in names]:
                raise InputError(
                    f"{file.where}: no column '{missing[0]}'; found {listed(names)} (for other tables: --format csv)"
                )
            for rows, table in read_delimited(file, dialect, _MOVIELENS):
                yield Piece("train", file.where, rows, table.rename_columns(_EVENT))

    def users() -> pa.Table:
        raw, gender, age, occupation, _ = _double_colon(by_name["users.dat"], 5)
        return pa.table({"raw": raw, "gender": gender, "age": age, "occupation": occupation})

    def items() -> pa.Table:
        if "movies.dat" in by_name:
            raw, title, genres = _double_colon(by_name["movies.dat"], 3)
            table = pa.table({"raw": raw, "title": title, "genres": genres})
        else:
            rows = read_delimited(
                by_name["movies.csv"], Dialect(encoding=config.encoding), ("movieId", "title", "genres")
            )
            table = _whole(by_name["movies.csv"], rows).rename_columns(["raw", "title", "genres"])
        year = pc.extract_regex(table.column("title"), r"\((?P<year>\d{4})\)\s*$")
        year = pc.struct_field(year, "year").cast(pa.float32())
        lists = pc.split_pattern(table.column("genres"), "|")
        return pa.table({"raw": table.column("raw"), "genres": lists, "year": year})

    return RawLog(
        "movielens",
        (file,),
        _PAIR,
        pieces,
        names=dict(zip(_EVENT, _MOVIELENS, strict=True)) if found[0] == "ratings.csv" else {},
        users=users if "users.dat" in by_name else None,
        items=items if "movies.dat" in by_name or "movies.csv" in by_name else None,
        untyped=_UNTYPED,
        integer_ids=True,
    )


def _whole(file: RawFile, parts: Iterable[tuple[Any, pa.Table]]) -> pa.Table:
    """All rows of a file in one table. Raises InputError if there are none."""
    tables = [table for _, table in parts]
    if not tables:
        raise InputError(f"{file.where}: no rows; expected at least one")
    return pa.concat_tables(tables)


def _double_colon(file: RawFile, fields: int) -> list[pa.ChunkedArray]:
    """Columns of small `::` files in UTF-8 or Latin-1, whose fields may hold single colons. At least one row."""
    try:
        lines = [line for _, line in read_lines(file)]
    except InputError:  # Latin-1 decodes any bytes
        lines = [line for _, line in read_lines(file, "latin-1")]
    rows = []
    for number, line in enumerate(pa.chunked_array(lines, pa.string()).to_pylist(), 1):
        if line.strip():
            rows.append(line.split("::"))
            if len(rows[-1]) != fields:
                raise InputError(f"{file.where}, line {number}: {len(rows[-1])} fields; expected {fields}")
    if not rows:
        raise InputError(f"{file.where}: empty")
    return [pa.chunked_array([column], pa.string()) for column in zip(*rows, strict=True)]


def ncf(config: IngestConfig, place: RawInput) -> RawLog:
    """`NAME.train.rating`, `NAME.test.rating`, `NAME.test.negative` (He et al. 2017)."""
    train, test, negative = _ncf_files(place)
    dialect = dialect_of(config, "\t", quoted=False)

    def pieces() -> Iterator[Piece]:
        for part, file in (("train", train), ("test", test)):
            for rows, table in read_delimited(file, dialect, _EVENT, _EVENT):
                yield Piece(part, file.where, rows, table)

    def negatives() -> Iterator[Piece]:
        assert negative is not None
        expected = _whole(test, read_delimited(test, dialect, _EVENT, _EVENT)).select(["user_id", "item_id"])
        end = 0
        for rows, lines in read_lines(negative):
            first = rows.first
            lines = _without_blank_end(lines)
            pairs = pc.extract_regex(lines, r"^\((?P<user>\d+),\s*(?P<item>\d+)\)\t(?P<rest>[0-9\t]+)\s*$")
            if pairs.null_count:
                line = rows.name(int(np.argmax(pc.is_null(pairs).to_numpy(zero_copy_only=False))))
                raise InputError(f"{negative.where}, {line}: expected (user,item) and items, separated by tabs")
            rest = pc.replace_substring_regex(pc.utf8_trim(pc.struct_field(pairs, "rest"), "\t"), r"\t+", "\t")
            users, items = (pc.struct_field(pairs, name) for name in ("user", "item"))
            table = pa.table({"user_id": users, "item_id": items, "negatives": pc.split_pattern(rest, "\t")})
            piece = expected.slice(first, len(lines))
            for name in ("user_id", "item_id"):
                given, wanted = table.column(name).to_pylist(), piece.column(name).to_pylist()
                other = next((k for k, pair in enumerate(zip(given, wanted, strict=False)) if pair[0] != pair[1]), None)
                if other is not None:
                    raise InputError(
                        f"{negative.where}, {rows.name(other)}: {name} {given[other]}; expected {wanted[other]}, as in "
                        f"{test.where}"
                    )
            end = first + len(lines)
            if end > expected.num_rows:
                break
            yield Piece("test_negatives", negative.where, rows, table)
        if end != expected.num_rows:
            more = "more" if end > expected.num_rows else end
            raise InputError(
                f"{negative.where}: {more} rows, {test.where} has {expected.num_rows}; expected one for each (is the "
                "file incomplete?)"
            )

    return RawLog(
        "ncf",
        (train, test),
        _PAIR,
        pieces,
        negatives if negative else None,
        untyped=_UNTYPED,
        integer_ids=True,
    )


def _without_blank_end(lines: pa.Array) -> pa.Array:
    """The lines without blank ones at their end."""
    filled = np.flatnonzero(pc.not_equal(pc.utf8_trim_whitespace(lines), "").to_numpy(zero_copy_only=False))
    return lines[: int(filled[-1]) + 1 if len(filled) else 0]


def _ncf_files(place: RawInput) -> tuple[RawFile, RawFile, RawFile | None]:
    """The triple of a folder that holds one, of `dir/ml-1m`, or of the name of one of its files."""
    ends = (".train.rating", ".test.rating", ".test.negative")
    _, files = place.home(lambda name: plain_name(name).endswith(ends[0]))
    by_name = {plain_name(name): file for name, file in files.items()}
    starts = [name.removesuffix(ends[0]) for name in by_name if name.endswith(ends[0])]
    given = plain_name(place.path.rpartition("/")[2])
    if not place.is_folder:
        start = next((given.removesuffix(end) for end in ends if given.endswith(end)), given)
    elif len(starts) != 1:
        raise InputError(f"{place.name}: {len(starts)} files *.train.rating; expected one, or its name")
    else:
        start = starts[0]
    for end in ends[:2]:
        if start + end not in by_name:
            raise InputError(f"{place.name}: no file {start}{end}; the NCF format needs it")
    return by_name[start + ends[0]], by_name[start + ends[1]], by_name.get(start + ends[2])


def lightgcn(config: IngestConfig, place: RawInput) -> RawLog:
    """`train.txt` and `test.txt`, maybe `val.txt` or `valid.txt`, or any one file: each line is a user and its
    items."""
    _, files = place.home(lambda name: plain_name(name) in LIGHTGCN)
    found = {plain_name(name): file for name, file in files.items() if plain_name(name) in LIGHTGCN}
    given = place.path.rpartition("/")[2]
    if not place.is_folder and plain_name(given) not in LIGHTGCN:
        found = {"train.txt": place.gather([""])[0]}
    if "train.txt" not in found:
        raise InputError(f"{place.name}: no train.txt; the LightGCN format needs it")
    if {"val.txt", "valid.txt"} <= found.keys():
        raise InputError(f"{place.name}: val.txt and valid.txt; expected one of them")

    def pieces() -> Iterator[Piece]:
        for name, part in LIGHTGCN.items():
            if name in found:
                for rows, lines in read_lines(found[name], config.encoding):
                    yield _adjacency(lines, part, found[name].where, rows, config.allow_empty_users)

    return RawLog("lightgcn", tuple(found.values()), Schema(), pieces, untyped=_UNTYPED)


def _adjacency(lines: pa.Array, part: str, where: str, rows: RowNumbers, allow_empty: bool) -> Piece:
    """`user item item ...` -> one row per item. Blank lines have no rows."""
    lines = pc.utf8_trim_whitespace(lines)
    blank = pc.equal(lines, "").to_numpy(zero_copy_only=False)
    row_of = np.flatnonzero(~blank)
    tokens = pc.split_pattern_regex(lines.filter(pa.array(~blank)), r"\s+")
    flat = tokens.flatten()
    lengths = pc.list_value_length(tokens).to_numpy(zero_copy_only=False).astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    good = pc.match_substring_regex(flat, "^[0-9]+$").to_numpy(zero_copy_only=False)
    if not good.all():
        place = int(np.argmin(good))
        line = rows.name(int(row_of[owner[place]]))
        raise InputError(f"{where}, {line}: {flat[place].as_py()!r}; expected ids >= 0")
    if not allow_empty and (lengths < 2).any():
        line = rows.name(int(row_of[int(np.argmax(lengths < 2))]))
        raise InputError(f"{where}, {line}: a user without items; --allow-empty-users skips such users")
    starts = np.cumsum(lengths) - lengths
    is_item = np.ones(len(flat), dtype=bool)
    is_item[starts] = False
    users = flat.take(pa.array(starts[owner[is_item]]))
    table = pa.table({"user_id": users, "item_id": flat.filter(pa.array(is_item))})
    return Piece(part, where, rows.each(row_of[owner[is_item]]), table)


def criteo(config: IngestConfig, files: Sequence[RawFile]) -> RawLog:
    """Criteo TSV: label, 13 integers, 26 hexadecimal categories; no header, no user, no item.

    The integers are not changed: float32, NaN if missing (take the logarithm in the model). A missing
    category is the category of the empty string.
    """
    names = ["label", *INTS, *CATEGORIES]
    for file in files:
        if num_fields(file) == 39:
            raise InputError(
                f"{file.where}: 39 fields, as in Criteo's test file, which has no labels; expected 40, the label first"
            )

    def pieces() -> Iterator[Piece]:
        for file in files:
            for rows, table in read_delimited(file, dialect_of(config, "\t", quoted=False), names, names):
                yield Piece("train", file.where, rows, table)

    schema = Schema(user="", item="", label="label", categorical=tuple(CATEGORIES), floats=tuple(INTS))
    return RawLog("criteo", tuple(files), schema, pieces)


def num_fields(file: RawFile) -> int:
    """Fields of the first line between tabs."""
    return first_lines(file).split("\n", 1)[0].count("\t") + 1


def is_criteo(file: RawFile) -> bool:
    """Whether the first line is one of Criteo, with or without a label; header lines and other columns are not."""
    fields = first_lines(file).split("\n", 1)[0].rstrip("\r").split("\t")
    ints = fields[len(fields) - 39 :][:13]
    return len(fields) in (39, 40) and all(re.fullmatch(r"-?\d*", value) for value in ints)
