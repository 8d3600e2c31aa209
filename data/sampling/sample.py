"""Writes a sample of a log as a new log, for many runs.

Train is the sampled rows, in the order of the log or shuffled, with all columns of the log's first file, in types that
all files fit. Held-out splits, side tables and vocabularies are copied unchanged, so ids keep their meaning. The
manifest's `sample_of` says what it is a sample of.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from recpress.data.config import LayoutConfig, SampleConfig
from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.files import first_line, list_files, shown
from recpress.data.dataset.log import KIND, Log
from recpress.data.dataset.parquet_split import ParquetSplit, RowGroup
from recpress.data.dataset.schema import cast_rows, stored_as
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.sampling.bucket_shuffle import BucketShuffle
from recpress.data.sampling.corrupt_groups import TolerantSplit, left_out
from recpress.data.sampling.selection import Selection


def write_sample(
    log: Log,
    out: str | Path,
    sample: SampleConfig,
    *,
    shuffle: bool = False,
    shuffle_rows: int = 1 << 22,
    layout: LayoutConfig | None = None,
    overwrite: bool = False,
) -> str | Path:
    """Writes the log `out`, whose train is `sample` of the train of `log`.

    Reads each row group once that has rows of the sample. In memory are two row groups of the log and one of `out`;
    with `shuffle`, up to five times `shuffle_rows` rows.

    Args:
        shuffle: write the rows in a random order, a function of the files, the sample's seed and `shuffle_rows`.
        shuffle_rows: rows of a bucket (see `BucketShuffle`). Buckets are in the folder of `out`, or in TMPDIR if it is
            remote.

    Of a log with `TolerantSplit`, row groups that cannot be read, or whose types cannot be converted, are skipped, and
    the manifest says so (`bad_groups.left_out`).

    Raises:
        InputError: no row is in the sample, or none can be read; a file that lacks a column or has it with a type that
            cannot be converted; what reading the log raises.
    """
    if shuffle_rows < 1:
        raise InputError(f"shuffle_rows is {shuffle_rows}; expected at least 1")
    old = log.manifest or {}
    meta: dict[str, Any] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite, inputs=[log.path]) as tmp,
        LogWriter(tmp, layout or LayoutConfig()) as writer,
    ):
        selection = Selection(log.train, sample)
        if selection.num_rows == 0:
            raise InputError(f"{log.path}: none of its {log.train.num_rows} rows is in {sample}")
        tables = selected_tables(log, selection)
        if shuffle:
            tables = _shuffled(tables, tmp / ".buckets", selection.num_rows, shuffle_rows, sample.seed)
        for table in tables:
            writer.part("train").write(table)
        if not writer.part("train").rows:
            raise InputError(f"{log.path}: none of the row groups that have rows of the sample can be read")
        shutil.rmtree(tmp / ".buckets", ignore_errors=True)
        copied = copy_unchanged(log, tmp)
        meta |= writer.manifest(
            log.schema,
            log.num_users,
            log.num_items,
            vocabularies=old.get("vocabularies", {}),
            features=old.get("features", {}),
            made_by="sample",
            shuffled=shuffle,
            sample_of=_sample_of(log, sample),
            **left_out(log),
        )
        meta["files"] += [artifact.describe_file(tmp / name, name) for name in copied]
    return artifact.place(out)


def _sample_of(log: Log, sample: SampleConfig) -> dict[str, Any]:
    """What the manifest says. All of a sample, written again, is a sample of what that is a sample of."""
    if sample.rate == 1.0 and log.sample_of is not None:
        return log.sample_of
    return {"sample": asdict(sample), "log": log.path, "rows": log.train.num_rows, "files": log.inputs()}


class Selected(Protocol):
    """Which rows of a log are written."""

    @property
    def candidates(self) -> np.ndarray: ...  # row groups that may have selected rows, sorted int64

    def of(self, group: int) -> np.ndarray | None: ...  # sorted int64 rows of it, None for all


def selected_tables(log: Log, selection: Selected) -> Iterator[pa.Table]:
    """The selected rows of each row group that has some, with all columns; the next row group is read ahead."""
    rows = log.train
    first, *others = [file for file in rows.files if file.metadata]
    schema = first.schema.remove_metadata()
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise InputError(f"{shown(log.filesystem, first.path)}: two columns '{twice[0]}'; expected different names")
    named = stored_as(list(rows.columns.values()), [schema, *(file.schema for file in others)])
    schema = pa.schema([named.field(field.name) if field.name in named.names else field for field in schema])

    def read(place: int) -> pa.Table | None:
        group, chosen = rows.groups[place], selection.of(place)
        try:
            table = _conformed(rows, group, schema)
        except InputError as error:
            if not isinstance(rows, TolerantSplit):
                raise
            rows.lose(group, error, group.num_rows if chosen is None else len(chosen))
            return None
        return table if chosen is None else table.take(pa.array(chosen))

    groups = selection.candidates.tolist()
    with ThreadPoolExecutor(1, thread_name_prefix="recpress-read") as pool:
        ahead = pool.submit(read, groups[0])
        for following in tqdm([*groups[1:], None], unit=" row groups", disable=None, desc="sampling"):
            table = ahead.result()
            if following is not None:
                ahead = pool.submit(read, following)
            if table is not None:
                yield table


def _conformed(rows: ParquetSplit, group: RowGroup, schema: pa.Schema) -> pa.Table:
    """A row group with the columns of the log's first file, in types that all files fit."""
    table, where = rows.read_table(group, schema.names), rows.where(group)
    for name in schema.names:
        if name not in table.column_names:
            raise InputError(f"{where}: no column '{name}', which the first file of the log has")
    try:
        return cast_rows(table, schema, rows.columns)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{where}: other types than the first file of the log: {first_line(error)}") from error


def _shuffled(
    tables: Iterator[pa.Table], folder: Path, rows: int, rows_in_memory: int, seed: int
) -> Iterator[pa.Table]:
    buckets = BucketShuffle(folder, rows, rows_in_memory, seed)
    try:
        for table in tables:
            buckets.add(table)
        yield from buckets.tables()
    finally:
        buckets.close()


def copy_unchanged(
    log: Log,
    target: Path,
    parts: Sequence[Literal["val", "test", "test_negatives"]] = ("val", "test", "test_negatives"),
) -> list[str]:
    """Copy held-out parts, side tables and vocabularies. Returns the names below the log."""
    if log.root is None:
        return []
    splits: list[ParquetSplit | None] = [getattr(log, part) for part in parts]
    held_out = [file.path for split in splits if split for file in split.files]
    names = [path[len(log.root) :].lstrip("/") for path in held_out]
    found = list_files(log.filesystem, log.root)
    names += [n for n in found if n in ("users.parquet", "items.parquet") or n.startswith("vocabulary/")]
    for name in names:
        object_store.fetch_file(object_store.join(log.path, name), target / name)
    return names
