"""Other formats -> a log: raw ids become dense ids by vocabularies that are kept with it.

Ids are numbered in the order of their first appearance: in train, then val and test, then the items that only
negatives name. Counts are those of train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs
from recpress.data import artifact, formats, sources
from recpress.data.config import IngestConfig
from recpress.data.encoder import Encoder
from recpress.data.errors import InputError
from recpress.data.files import file_type, is_pattern, list_folder, resolve
from recpress.data.holdout import leave_one_out
from recpress.data.log import KIND, SIDES, open_log
from recpress.data.sources import Source
from recpress.data.writer import LogWriter
from tqdm import tqdm

KEPT = ("made_by", "source", "config", "inputs", "extends")  # of the manifest, when `holdout` splits the log


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
            raise InputError(f"{config.input}: has a test part of its own; holdout is '{config.holdout}'")
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
    source = open_source(config)
    encoder = Encoder(source.schema, config)
    meta: dict[str, Any] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite, inputs=_inputs(config)) as tmp,
        LogWriter(tmp, config.layout) as writer,
    ):
        with tqdm(unit=" rows", unit_scale=True, disable=None, desc=f"ingest {source.format}") as bar:
            for piece in source.pieces():
                writer.part(piece.part).write(encoder.encode(piece))
                bar.update(piece.table.num_rows)
        if not writer.part("train").rows:
            raise InputError(f"{config.input}: no rows for train")
        if source.negatives is not None:
            for piece in source.negatives():
                writer.part("test_negatives").write(encoder.encode_negatives(piece))
        encoder.write_side_tables(source, writer)
        encoder.write_vocabularies(writer)
        users, items = (len(encoder.sides[side]) if side in encoder.sides else 0 for side in SIDES)
        filesystem, _ = resolve(config.input)
        meta |= writer.manifest(
            source.schema,
            users,
            items,
            **encoder.manifest(),
            made_by="ingest",
            source=source.format,
            config=asdict(config),
            inputs=[{"name": path, "fingerprint": artifact.fingerprint(path, filesystem)} for path in source.files],
        )
    return artifact.place(out)


def _inputs(config: IngestConfig) -> list[str]:
    return [config.input, *([config.extend] if config.extend else [])]


def open_source(config: IngestConfig) -> Source:
    """The reader of `config.input`. Raises InputError where the format cannot be told from the names of the
    files."""
    filesystem, path = resolve(config.input)
    kind = file_type(filesystem, path)
    if kind == pafs.FileType.NotFound and not is_pattern(filesystem, path) and config.format not in ("auto", "ncf"):
        raise InputError(f"{config.input}: no such file or folder")
    found = config.format if config.format != "auto" else detect(config, filesystem, path)
    folder = path if kind == pafs.FileType.Directory else path.rpartition("/")[0] or "."
    text = {"csv": (".csv", ","), "tsv": (".tsv", "\t")}
    if found in text:
        suffix, delimiter = text[found]
        return sources.delimited(config, filesystem, sources.find_files(config, filesystem, path, [suffix]), delimiter)
    readers: dict[str, Callable[[], Source]] = {
        "movielens": lambda: formats.movielens(config, filesystem, folder),
        "ncf": lambda: formats.ncf(config, filesystem, _ncf_start(config, filesystem, path)),
        "lightgcn": lambda: formats.lightgcn(config, filesystem, folder),
        "criteo": lambda: formats.criteo(
            config, filesystem, sources.find_files(config, filesystem, path, ["train.txt", ".tsv"])
        ),
        "parquet": lambda: sources.parquet(
            config, filesystem, sources.find_files(config, filesystem, path, [".parquet"])
        ),
    }
    return readers[found]()


def detect(config: IngestConfig, filesystem: pafs.FileSystem, path: str) -> str:
    """The format by names; a `train.txt` or `.tsv` with 39 tabs in its first line is Criteo."""
    if file_type(filesystem, path) == pafs.FileType.Directory:
        names = list(list_folder(filesystem, path))
        first = f"{path}/train.txt"
    else:
        names = [path.rpartition("/")[2]]
        first = path
    plain = [name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".zst") for name in names]
    if {"ratings.dat", "ratings.csv"} & set(names):
        return "movielens"
    if any(name.endswith((".train.rating", ".test.rating")) for name in names):
        return "ncf"
    if "train.txt" in names:
        return "criteo" if formats.first_line_of(filesystem, first).count("\t") == 39 else "lightgcn"
    for suffix in ("parquet", "csv"):
        if any(name.endswith("." + suffix) for name in plain):
            return suffix
    if any(name.endswith(".tsv") for name in plain):
        file = sources.find_files(config, filesystem, path, [".tsv"])[0]
        return "criteo" if formats.first_line_of(filesystem, file).count("\t") == 39 else "tsv"
    folder, _, start = path.rpartition("/")
    if start and f"{start}.train.rating" in list_folder(filesystem, folder or "."):
        return "ncf"
    raise InputError(
        f"{config.input}: the names of the files show no format; name one of movielens, ncf, lightgcn, "
        "criteo, csv, tsv, parquet"
    )


def _ncf_start(config: IngestConfig, filesystem: pafs.FileSystem, path: str) -> str:
    """`dir/ml-1m` of `dir/ml-1m.train.rating`, of itself, or of a folder that holds one such triple."""
    for end in (".train.rating", ".test.rating", ".test.negative"):
        if path.endswith(end):
            return path.removesuffix(end)
    if file_type(filesystem, path) != pafs.FileType.Directory:
        return path
    found = [name for name in list_folder(filesystem, path) if name.endswith(".train.rating")]
    if len(found) != 1:
        raise InputError(f"{config.input}: {len(found)} files *.train.rating; expected one, or its name")
    return f"{path}/{found[0].removesuffix('.train.rating')}"
