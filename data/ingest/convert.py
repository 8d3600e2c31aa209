"""Converts other formats to a log: raw ids become dense ids by vocabularies, which the log stores.

Ids are numbered in the order of their first appearance: in train, then val and test, then the items that only
negatives name. Counts are those of train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recpress.data.config import IngestConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.files import is_pattern
from recpress.data.dataset.log import KIND, SIDES, open_log
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.ingest import formats, raw_files, sources
from recpress.data.ingest.encoder import Encoder, FinerTimes
from recpress.data.ingest.raw_files import RawInput, has_suffix, plain_name
from recpress.data.ingest.sources import RawLog
from recpress.data.ingest.split import leave_one_out

logger = logging.getLogger(__name__)

KEPT = ("made_by", "source", "config", "inputs", "extends")  # of the manifest, when `holdout` splits the log
SUFFIXES = {
    "parquet": (".parquet", ".parq", ".pq"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "json": (".json", ".jsonl", ".ndjson"),
}


def ingest(config: IngestConfig, out: str | Path, *, overwrite: bool = False) -> str | Path:
    """Writes the log `out` from files of another format, and returns it.

    Raises:
        InputError: a format that cannot be told, a missing column or value, a value of a wrong type, a user
            without items, ids beyond the memory allowed; each with file and row. Nothing is left behind then.
    """
    if config.holdout == "none":
        return _ingest(config, out, overwrite)
    whole = artifact.begin(
        out, overwrite=overwrite, kind=KIND, inputs=_inputs(config)
    )  # the log before the split, beside the target
    try:
        log = open_log(_ingest(config, whole / "whole", False))
        if log.test is not None:
            raise InputError(f"{config.input}: already has a test part; holdout is '{config.holdout}'")
        return leave_one_out(
            replace(log, path=config.input),  # what errors name
            out,
            by=config.holdout,
            seed=config.seed,
            negatives=config.negatives,
            layout=config.layout,
            overwrite=overwrite,
            more={key: log.manifest[key] for key in KEPT if log.manifest and key in log.manifest},
        )
    finally:
        artifact.abort(whole)


def _ingest(config: IngestConfig, out: str | Path, overwrite: bool) -> str | Path:
    place, source = _open(config)
    unit = ""  # of times; a finer one, which a later row needs, begins anew
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
    found = config.format if config.format != "auto" else detect(place)
    readers: dict[str, Callable[[], RawLog]] = {
        "movielens": lambda: formats.movielens(config, place),
        "ncf": lambda: formats.ncf(config, place),
        "lightgcn": lambda: formats.lightgcn(config, place),
        "criteo": lambda: formats.criteo(config, place.gather(["train.txt", ".tsv"])),
        "csv": lambda: sources.delimited(config, place.gather(SUFFIXES["csv"]), "csv"),
        "tsv": lambda: sources.delimited(config, place.gather(SUFFIXES["tsv"]), "tsv"),
        "json": lambda: sources.json_lines(config, place.gather(SUFFIXES["json"])),
        "parquet": lambda: sources.parquet(config, place.gather(SUFFIXES["parquet"])),
    }
    return place, readers[found]()


def detect(place: RawInput) -> str:
    """The format by names; a `train.txt` or `.tsv` whose first line is one of Criteo's is Criteo."""
    if not raw_files.exists(place):
        if _is_ncf(place):
            return "ncf"
        raise InputError(f"{place.name}: no such file or folder")
    files = (place.home(_of_named_format)[1] if place.is_folder else {}) or place.files()
    if not files and is_pattern(place.filesystem, place.path):
        raise InputError(f"{place.name}: no file matches")
    if place.is_folder or len(files) == 1:
        by_name = {plain_name(name): file for name, file in files.items()}
        if set(formats.RATINGS) & by_name.keys():
            return "movielens"
        if any(name.endswith((".train.rating", ".test.rating", ".test.negative")) for name in by_name):
            return "ncf"
        if "train.txt" in by_name:
            return "criteo" if formats.num_fields(by_name["train.txt"]) in (39, 40) else "lightgcn"
    having = [name for name, ends in SUFFIXES.items() if any(has_suffix(file, ends) for file in files)]
    having = having or [name for name, ends in SUFFIXES.items() if place.is_folder and place.holds(ends)]
    having = [name for name in having if name != "json"] or having  # JSON beside tables is mostly about them
    if len(having) > 1:
        raise InputError(f"{place.name}: files of several formats ({', '.join(having)}); name one by --format")
    if having == ["tsv"] and all(map(formats.is_criteo, place.gather(SUFFIXES["tsv"]))):
        return "criteo"
    if having:
        return having[0]
    raise InputError(
        f"{place.name}: the names of the files show no format; name one of movielens, ncf, lightgcn, "
        "criteo, csv, tsv, json, parquet by --format"
    )


def _of_named_format(name: str) -> bool:
    name = plain_name(name)
    return name in (*formats.RATINGS, "train.txt") or name.endswith(".train.rating")


def _is_ncf(place: RawInput) -> bool:
    start = place.path.rpartition("/")[2]
    return bool(start) and any(name.startswith(f"{start}.train.rating") for name in place.home(lambda name: True)[1])
