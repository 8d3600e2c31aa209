"""Converts other formats to a log: raw ids become dense ids by vocabularies, which the log stores.

Ids are numbered in the order of their first appearance: in train, then val and test, then the items that only
negatives name. Counts are those of train.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recpress.data.config import IngestConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.files import exists, is_pattern
from recpress.data.dataset.log import KIND, SIDES, open_log
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.ingest import formats, raw_files, sources
from recpress.data.ingest.encoder import Encoder, FinerTimes
from recpress.data.ingest.raw_files import RawFile, RawInput, has_suffix, plain_name
from recpress.data.ingest.raw_text import first_lines, listed
from recpress.data.ingest.sources import RawLog
from recpress.data.ingest.split import leave_one_out

logger = logging.getLogger(__name__)

_INHERITED = ("made_by", "source", "config", "inputs", "extends")  # of the manifest, when `holdout` splits the log
SUFFIXES = {
    "parquet": (".parquet", ".parq", ".pq"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "json": (".json", ".jsonl", ".ndjson"),
}
_DESCRIPTIONS = re.compile(r"(manifest|metadata|dataset[-_](metadata|info|infos)|schema|state)\.json")
"""Names of JSON files that describe the tables in their folder."""
_BINARY = (
    ".xlsx", ".xls", ".ods", ".feather", ".arrow", ".ipc", ".orc", ".avro", ".h5", ".hdf5", ".npz", ".npy",
    ".pkl", ".pickle", ".rds", ".rdata", ".mat", ".db", ".sqlite", ".sqlite3", ".duckdb",
)  # fmt: skip
"""Suffixes of files that ingest does not read."""
_HELD_OUT = {"test", "val", "valid", "validation", "dev", "eval", "holdout"}
_TRAIN = {"train", "training"}


def ingest(config: IngestConfig, out: str | Path, *, overwrite: bool = False) -> str | Path:
    """Writes the log `out` from files of another format, and returns it.

    Raises:
        InputError: the format is ambiguous; a column or value is missing or of a wrong type; a user has no items; ids
            exceed the memory limit. The message names file and row. Nothing is left in the output folder.
    """
    place, source = _open(config)
    if config.holdout == "none":
        return _ingest(config, place, source, out, overwrite)
    if config.holdout == "last" and source.schema.time is None:
        timed = source.format in ("csv", "tsv", "json", "parquet")
        fix = "name it with --time" if timed else f"the format {source.format} has none; expected --holdout random"
        raise InputError(f"{config.input}: --holdout last needs a column of times; {fix}")
    unsplit = artifact.begin(out, overwrite=overwrite, kind=KIND, inputs=_inputs(config))  # in the folder of `out`
    try:
        log = open_log(_ingest(config, place, source, unsplit / "log", False))
        if log.test is not None:
            raise InputError(f"{config.input}: already has a test part; holdout is '{config.holdout}'")
        return leave_one_out(
            replace(log, path=config.input),  # for errors
            out,
            by=config.holdout,
            seed=config.seed,
            negatives=config.negatives,
            layout=config.layout,
            overwrite=overwrite,
            more={key: log.manifest[key] for key in _INHERITED if log.manifest and key in log.manifest},
        )
    finally:
        artifact.abort(unsplit)


def _ingest(config: IngestConfig, place: RawInput, source: RawLog, out: str | Path, overwrite: bool) -> str | Path:
    unit = ""  # of times; a later row that needs a finer one starts over
    while True:
        try:
            return _write(config, place, source, out, overwrite, unit)
        except FinerTimes as need:
            unit = need.unit


def _write(
    config: IngestConfig, place: RawInput, source: RawLog, out: str | Path, overwrite: bool, unit: str
) -> str | Path:
    encoder = Encoder(source, config, unit)
    meta: dict[str, Any] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite, inputs=_inputs(config)) as tmp,
        LogWriter(tmp, config.layout) as writer,
    ):
        with tqdm(unit=" rows", unit_scale=True, disable=None, desc=f"ingest {source.format}") as bar:
            for piece in source.pieces():
                for part, table in encoder.encode(piece):
                    if table.num_rows:  # a part without rows has no files
                        writer.part(part).write(table)
                bar.update(piece.table.num_rows)
        encoder.check_epochs()
        if not writer.part("train").rows:
            raise InputError(f"{config.input}: no rows for train")
        if source.negatives is not None:
            for piece in source.negatives():
                if piece.table.num_rows:
                    writer.part("test_negatives").write(encoder.encode_negatives(piece))
        for line in encoder.suspicious():
            logger.warning("%s: %s", config.input, line)
        encoder.write_side_tables(source, writer)
        encoder.write_vocabularies(writer)
        users, items = (len(encoder.sides[side]) if side in encoder.sides else 0 for side in SIDES)
        meta |= writer.manifest(
            source.schema,
            users,
            items,
            **encoder.manifest(),
            made_by="ingest",
            source=source.format,
            config=asdict(config),
            inputs=_fingerprints(place, source),
        )
    return artifact.place(out)


def _fingerprints(place: RawInput, source: RawLog) -> list[dict[str, str]]:
    if place.archive is not None:
        filesystem, path = place.archive
        return [{"name": path, "fingerprint": artifact.fingerprint(path, filesystem)}]
    return [
        {"name": file.path, "fingerprint": artifact.fingerprint(file.path, file.filesystem)} for file in source.files
    ]


def _inputs(config: IngestConfig) -> list[str]:
    return [config.input, *([config.extend] if config.extend else [])]


def _open(config: IngestConfig) -> tuple[RawInput, RawLog]:
    place = raw_files.open_input(config.input)
    if not raw_files.exists(place) and config.format not in ("auto", "ncf"):
        raise InputError(f"{config.input}: no such file or folder")
    _check_raw(place)
    found = config.format if config.format != "auto" else detect(place, config)

    def gather(suffixes: Sequence[str]) -> list[RawFile]:
        files = place.gather(suffixes)
        _check_held_out(place, files, config)
        return files

    readers: dict[str, Callable[[], RawLog]] = {
        "movielens": lambda: formats.movielens(config, place),
        "ncf": lambda: formats.ncf(config, place),
        "lightgcn": lambda: formats.lightgcn(config, place),
        "criteo": lambda: formats.criteo(config, gather(["train.txt", ".tsv"])),
        "csv": lambda: sources.delimited(config, gather(SUFFIXES["csv"]), "csv"),
        "tsv": lambda: sources.delimited(config, gather(SUFFIXES["tsv"]), "tsv"),
        "json": lambda: sources.json_lines(config, gather(SUFFIXES["json"])),
        "parquet": lambda: sources.parquet(config, gather(SUFFIXES["parquet"])),
    }
    return place, readers[found]()


def detect(place: RawInput, config: IngestConfig) -> str:
    """The format by the names of the files; a `train.txt` or `.tsv` with a first line of Criteo is Criteo.

    Raises InputError if no format, or more than one, has files.
    """
    if not raw_files.exists(place):
        if _is_ncf(place):
            return "ncf"
        raise InputError(f"{place.name}: no such file or folder")
    files = (place.home(_of_named_format)[1] if place.is_folder else {}) or place.files()
    if not files and is_pattern(place.filesystem, place.path):
        raise InputError(f"{place.name}: no file matches")
    tables = _tables(place, config)
    if place.is_folder or len(files) == 1:
        by_name = {plain_name(name): file for name, file in files.items()}
        if found := _named_format(by_name):
            _check_alone(place, found, by_name, tables)
            return found
    if len(tables) > 1:
        (one, [first, *_]), (other, [second, *_]), *_ = tables.items()
        raise InputError(
            f"{place.name}: files of several formats: {place.short_name(first)} ({one}) and {place.short_name(second)} "
            f"({other}); expected one: name the files by a glob (--input {_glob(place, first)}), or the format "
            f"(--format {one})"
        )
    having = list(tables)
    if having == ["tsv"] and all(map(formats.is_criteo, place.gather(SUFFIXES["tsv"]))):
        return "criteo"
    if having:
        return having[0]
    binary = [name for name in files if plain_name(name).lower().endswith(_BINARY)]
    if binary:
        raise InputError(f"{place.name}: {binary[0]} is neither text nor Parquet; expected it exported as one of them")
    raise InputError(
        f"{place.name}: the names of the files show no format; choose one of movielens, ncf, lightgcn, "
        "criteo, csv, tsv, json, parquet with --format"
    )


def _named_format(by_name: dict[str, RawFile]) -> str | None:
    """The format of a public data set, by the names of its files."""
    if set(formats.RATINGS) & by_name.keys():
        return "movielens"
    if any(name.endswith((".train.rating", ".test.rating", ".test.negative")) for name in by_name):
        return "ncf"
    if "train.txt" in by_name:
        return "criteo" if formats.num_fields(by_name["train.txt"]) in (39, 40) else "lightgcn"
    return None


def _tables(place: RawInput, config: IngestConfig) -> dict[str, list[RawFile]]:
    """Files of csv, tsv, json and parquet by format. JSON next to other tables counts if it may contain rows."""
    files = place.all_files()
    found = {name: [file for file in files if has_suffix(file.path, ends)] for name, ends in SUFFIXES.items()}
    found = {name: of_format for name, of_format in found.items() if of_format}
    if not place.is_folder or "json" not in found:
        return found
    if len(found) > 1 or any(_of_named_format(file.path.rpartition("/")[2]) for file in files):
        rows = [file for file in found["json"] if _may_hold_rows(file, config)]
        skipped = [file for file in found["json"] if file not in rows and not _is_description(file)]
        if skipped:
            names = listed(map(place.short_name, skipped))
            logger.warning(
                "%s: not read, because they do not have the columns of the other files: %s", place.name, names
            )
        found["json"] = rows
    return {name: of_format for name, of_format in found.items() if of_format}


def _is_description(file: RawFile) -> bool:
    return _DESCRIPTIONS.fullmatch(plain_name(file.path.rpartition("/")[2]).lower()) is not None


def _may_hold_rows(file: RawFile, config: IngestConfig) -> bool:
    """Whether the start of a JSON file has keys that are columns to read."""
    if _is_description(file):
        return False
    start = first_lines(file)
    columns = (config.user, config.item, *config.categorical, "userId", "movieId")
    return any(f'"{name}"' in start for name in columns if name)


def _check_alone(place: RawInput, found: str, by_name: dict[str, RawFile], tables: dict[str, list[RawFile]]) -> None:
    """Raises InputError if a folder of a public data set also has other tables."""
    names = (*formats.RATINGS, *formats.MOVIELENS_TABLES) if found == "movielens" else ()
    known = {by_name[name].path for name in names if name in by_name}
    others = [
        file
        for of_format in tables.values()
        for file in of_format
        if file.path not in known and not (found == "criteo" and has_suffix(file.path, SUFFIXES["tsv"]))
    ]
    if others and place.is_folder:
        file = next(file for name, file in by_name.items() if _named_format({name: file}))
        raise InputError(
            f"{place.name}: files of several formats: {place.short_name(file)} ({found}) and "
            f"{place.short_name(others[0])}, which that format does not read; expected one: name the files by --input "
            f"(a file or a glob, such as {_glob(place, others[0])}), or the format (--format {found})"
        )


def _glob(place: RawInput, file: RawFile) -> str:
    """A glob of the files that have the suffix of this one, as a shell takes it."""
    name = file.path.rpartition("/")[2]
    plain = plain_name(name)
    pattern = f"*.{plain.rpartition('.')[2]}{name.removeprefix(plain)}"
    if not place.is_folder or place.archive is not None:
        return f"'{pattern}'"
    folder = place.short_name(file).rpartition("/")[0]
    return f"'{'/'.join(part for part in (place.name.rstrip('/'), folder, pattern) if part)}'"


def _check_raw(place: RawInput) -> None:
    """Raises InputError if the input is an artifact of recpress, such as a log."""
    if not place.is_folder or not exists(place.filesystem, f"{place.path}/{artifact.MANIFEST}"):
        return
    try:
        kind = artifact.read_manifest(place.path, filesystem=place.filesystem).get("kind")
    except InputError:  # of another program
        return
    what = "already a log" if kind == KIND else f"an artifact of kind '{kind}'"
    raise InputError(
        f"{place.name}: is {what}; expected raw files (a log is read as it is, and `recpress split` holds examples out)"
    )


def _words(file: RawFile) -> set[str]:
    """Words in the name of a file, and in the values of its partitions."""
    values = [value or "" for _, value in file.partitions]
    return set(re.split(r"[^a-z]+", " ".join([file.path.rpartition("/")[2], *values]).lower()))


def _check_held_out(place: RawInput, files: Sequence[RawFile], config: IngestConfig) -> None:
    """Raises InputError if files of a folder are named like train and like test; warns where a glob names them."""
    if config.split_column:
        return
    words = [(place.short_name(file), _words(file)) for file in files]
    train = [name for name, found in words if found & _TRAIN and not found & _HELD_OUT]
    held_out = [name for name, found in words if found & _HELD_OUT]
    if not train or not held_out:
        return
    if not place.is_folder:
        logger.warning("%s: read as train, although named like a held-out part: %s", place.name, listed(held_out))
        return
    if place.archive is not None:
        fix = f"unpack the archive, and --input {train[0]} reads only that file"
    elif len(train) == 1:
        fix = f"--input {place.name.rstrip('/')}/{train[0]} reads only that file"
    else:
        fix = "--input with a glob of the train files reads only those"
    raise InputError(
        f"{place.name}: {held_out[0]} is named like a held-out part, next to {train[0]}; {fix} (recpress split holds "
        "examples out; a glob of all files reads all as train)"
    )


def _of_named_format(name: str) -> bool:
    name = plain_name(name)
    return name in (*formats.RATINGS, "train.txt") or name.endswith(".train.rating")


def _is_ncf(place: RawInput) -> bool:
    start = place.path.rpartition("/")[2]
    return bool(start) and any(name.startswith(f"{start}.train.rating") for name in place.home(lambda name: True)[1])
