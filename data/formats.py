"""Readers of the formats that public data sets come in: MovieLens, the NCF triple, LightGCN, Criteo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs
from recpress.data.config import IngestConfig, Schema
from recpress.data.errors import InputError
from recpress.data.files import file_type, list_folder
from recpress.data.sources import Piece, Source, by_part, check_missing, read_text

INTS = [f"I{place}" for place in range(1, 14)]
CATEGORIES = [f"C{place}" for place in range(1, 27)]
_EVENT = ("user_id", "item_id", "label", "time")
_EVENT_TYPES = {"user_id": pa.int64(), "item_id": pa.int64(), "label": pa.float64(), "time": pa.int64()}


def movielens(config: IngestConfig, filesystem: pafs.FileSystem, folder: str) -> Source:
    """`ratings.dat` (1M, 10M) or `ratings.csv` (20M and later), with users.dat, movies.dat or movies.csv
    beside it.

    Ratings become labels. Side tables: gender, age and occupation of users; genres (a list) and year of
    items.
    """
    names = list_folder(filesystem, folder)
    found = next((name for name in ("ratings.dat", "ratings.csv") if name in names), None)
    if found is None:
        raise InputError(f"{config.input}: no ratings.dat or ratings.csv")
    path = names[found].path

    def pieces() -> Iterator[Piece]:
        if found == "ratings.dat":  # `::` is two delimiters with an empty field between them
            fields = ["user_id", "a", "item_id", "b", "label", "c", "time"]
            events = {name: name for name in _EVENT}
            rows = read_text(
                filesystem,
                path,
                delimiter=":",
                names=fields,
                columns=events,
                types=_EVENT_TYPES,
                quoted=False,
            )
        else:
            columns = dict(zip(("userId", "movieId", "rating", "timestamp"), _EVENT, strict=True))
            types = {name: _EVENT_TYPES[target] for name, target in columns.items()}
            rows = read_text(filesystem, path, delimiter=",", columns=columns, types=types)
        for first, table in rows:
            yield from by_part(table, path, first)

    def users() -> pa.Table:
        rows = _double_colon(filesystem, names["users.dat"].path, 5)
        raw, gender, age, occupation, _ = zip(*rows, strict=True)
        ids = _integers(raw, names["users.dat"].path)
        return pa.table({"raw": ids, "gender": gender, "age": age, "occupation": occupation})

    def items() -> pa.Table:
        if "movies.dat" in names:
            raw, titles, genres = zip(*_double_colon(filesystem, names["movies.dat"].path, 3), strict=True)
            ids = _integers(raw, names["movies.dat"].path)
            table = pa.table({"raw": ids, "title": titles, "genres": genres})
        else:
            columns = {"movieId": "raw", "title": "title", "genres": "genres"}
            types = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
            rows = read_text(filesystem, names["movies.csv"].path, delimiter=",", columns=columns, types=types)
            table = pa.concat_tables([part for _, part in rows])
        year = pc.extract_regex(table.column("title"), r"\((?P<year>\d{4})\)\s*$")
        year = pc.struct_field(year, "year").cast(pa.float32())
        lists = pc.split_pattern(table.column("genres"), "|")
        return pa.table({"raw": table.column("raw"), "genres": lists, "year": year})

    return Source(
        "movielens",
        (path,),
        Schema(label="label", time="time"),
        pieces,
        users=users if "users.dat" in names else None,
        items=items if "movies.dat" in names or "movies.csv" in names else None,
    )


def _double_colon(filesystem: pafs.FileSystem, path: str, fields: int) -> list[list[str]]:
    """Small `::` files in Latin-1, whose fields may hold single colons. At least one row."""
    with filesystem.open_input_stream(path) as stream:
        lines = stream.read().decode("latin-1").splitlines()
    rows = [line.split("::") for line in lines]
    for number, row in enumerate(rows):
        if len(row) != fields:
            raise InputError(f"{path}, row {number}: {len(row)} fields; expected {fields}")
    if not rows:
        raise InputError(f"{path}: empty")
    return rows


def _integers(raw: Sequence[str], path: str) -> pa.Array:
    try:
        return pa.array(raw).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def ncf(config: IngestConfig, filesystem: pafs.FileSystem, start: str) -> Source:
    """`NAME.train.rating`, `NAME.test.rating`, `NAME.test.negative` (He et al. 2017)."""
    train, test, negative = (f"{start}.{end}" for end in ("train.rating", "test.rating", "test.negative"))

    def pieces() -> Iterator[Piece]:
        for part, path in (("train", train), ("test", test)):
            for first, table in read_text(filesystem, path, delimiter="\t", names=_EVENT, types=_EVENT_TYPES):
                check_missing(table, path, first)
                yield Piece(part, path, first, table)

    def negatives() -> Iterator[Piece]:
        tests = [table for _, table in read_text(filesystem, test, delimiter="\t", names=_EVENT, types=_EVENT_TYPES)]
        expected = pa.concat_tables(tests).select(["user_id", "item_id"])
        for first, lines in _lines(filesystem, negative):
            pairs = pc.extract_regex(lines, r"^\((?P<user>\d+),\s*(?P<item>\d+)\)\t(?P<rest>[0-9\t]+)\s*$")
            if pairs.null_count:
                row = first + int(np.argmax(pc.is_null(pairs).to_numpy(zero_copy_only=False)))
                raise InputError(f"{negative}, row {row}: expected (user,item) and items, separated by tabs")
            users, items = (pc.struct_field(pairs, name).cast(pa.int64()) for name in ("user", "item"))
            lists = pc.split_pattern(pc.utf8_trim(pc.struct_field(pairs, "rest"), "\t"), "\t")
            table = pa.table({"user_id": users, "item_id": items, "negatives": lists.cast(pa.list_(pa.int64()))})
            piece = expected.slice(first, len(lines))
            for name in ("user_id", "item_id"):
                if piece.column(name).combine_chunks() != table.column(name).combine_chunks():
                    raise InputError(f"{negative}, rows {first} and on: {name} is not that of {test} in every row")
            yield Piece("test_negatives", negative, first, table)

    has = {path: file_type(filesystem, path) == pafs.FileType.File for path in (train, test, negative)}
    for path in (train, test):
        if not has[path]:
            raise InputError(f"{path}: no such file; the NCF format needs it")
    return Source(
        "ncf", (train, test), Schema(label="label", time="time"), pieces, negatives if has[negative] else None
    )


def lightgcn(config: IngestConfig, filesystem: pafs.FileSystem, folder: str) -> Source:
    """`train.txt` and `test.txt`, maybe `val.txt` or `valid.txt`: a line is a user and its items."""
    names = list_folder(filesystem, folder)
    files = {
        "train": "train.txt",
        "val": "val.txt" if "val.txt" in names else "valid.txt",
        "test": "test.txt",
    }
    paths = {part: names[name].path for part, name in files.items() if name in names}

    def pieces() -> Iterator[Piece]:
        for part, path in paths.items():
            for first, lines in _lines(filesystem, path):
                yield Piece(part, path, first, _adjacency(lines, path, first, config.allow_empty_users))

    return Source("lightgcn", tuple(paths.values()), Schema(), pieces)


def _lines(filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[int, pa.Array]]:
    """Lines of a text file, as (ordinal of the first, strings)."""
    rows = read_text(filesystem, path, delimiter="\x01", names=["line"], types={"line": pa.string()}, quoted=False)
    for first, table in rows:
        yield first, table.column("line").combine_chunks()


def _adjacency(lines: pa.Array, path: str, first: int, allow_empty: bool) -> pa.Table:
    """`user item item ...` -> one row for each item."""
    tokens = pc.split_pattern_regex(pc.utf8_trim_whitespace(lines), r"\s+")
    flat = tokens.flatten()
    lengths = pc.list_value_length(tokens).to_numpy()
    blank = pc.equal(pc.utf8_trim_whitespace(lines), "").to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(lines)), lengths)
    good = pc.match_substring_regex(flat, "^[0-9]{1,18}$").to_numpy(zero_copy_only=False) | blank[owner]
    if not good.all():
        place = int(np.argmin(good))
        raise InputError(f"{path}, row {first + owner[place]}: {flat[place].as_py()!r}; expected ids >= 0")
    if not allow_empty and (lengths[~blank] < 2).any():
        row = int(np.argmax((lengths < 2) & ~blank))
        raise InputError(f"{path}, row {first + row}: a user without items; `allow_empty_users` skips such users")
    values = pc.if_else(pa.array(blank[owner]), "0", flat).cast(pa.int64()).to_numpy()
    starts = np.cumsum(lengths) - lengths
    is_item = np.ones(len(values), dtype=bool)
    is_item[starts] = False
    users = np.repeat(values[starts], lengths)
    return pa.table({"user_id": users[is_item], "item_id": values[is_item]})


def criteo(config: IngestConfig, filesystem: pafs.FileSystem, files: list[str]) -> Source:
    """Criteo TSV: label, 13 integers, 26 hexadecimal categories; no header, no user, no item.

    The integers stay as they are, float32, a missing one NaN (take the logarithm in the model). A missing
    category is the category of the empty string.
    """
    names = ["label", *INTS, *CATEGORIES]
    types = {"label": pa.float64()} | {name: pa.float64() for name in INTS}
    types |= {name: pa.string() for name in CATEGORIES}

    def pieces() -> Iterator[Piece]:
        for path in files:
            for first, table in read_text(filesystem, path, delimiter="\t", names=names, types=types, quoted=False):
                yield from by_part(table, path, first)

    schema = Schema(user="", item="", label="label", categorical=tuple(CATEGORIES), floats=tuple(INTS))
    return Source("criteo", tuple(files), schema, pieces)


def first_line_of(filesystem: pafs.FileSystem, path: str) -> str:
    """The beginning of the first line, to tell formats apart."""
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read(1 << 14)).split(b"\n", 1)[0].decode("latin-1")
