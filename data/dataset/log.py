"""A log of interactions: a folder of Parquet files with dense ids, written by recpress or by other programs.

By convention a folder holds `train.parquet`, `train-*.parquet` or `train/*.parquet`, and may hold, named
likewise, `val`, `test` (pairs that were held out) and `test_negatives` (columns `user_id`, `pos_item_id` and
`negatives`, a list of items). A folder that `recpress synth` or `recpress ingest` wrote has further a
`manifest.json`, `vocabulary/user.parquet` and `vocabulary/item.parquet` (columns `raw` and `count`; row k is
dense id k), and may have side tables `users.parquet` and `items.parquet` (row k is dense id k). A single file
or a glob is a log of train rows alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from recpress.data.config import Schema
from recpress.data.dataset import artifact
from recpress.data.dataset.columns import Column, is_dense, kind_of_values
from recpress.data.dataset.files import (
    INGEST_HINT,
    expand,
    file_infos,
    file_type,
    is_glob,
    is_hidden,
    list_folder,
    resolve,
    shown,
    split_glob,
    walk,
)
from recpress.data.dataset.hashed_columns import check_hashed, hash_sizes
from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups, largest_id, open_split, read_whole
from recpress.data.dataset.partitions import is_partition, partition_root
from recpress.data.dataset.schema import common_time
from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["Log", "open_log"]

KIND = "log"
PARTS = ("train", "val", "test", "test_negatives")
_NAMES = {part: (part,) for part in PARTS} | {"val": ("val", "valid", "validation")}
_TEXT_SUFFIXES = tuple(
    suffix + packed
    for suffix in (".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".json", ".jsonl", ".ndjson")
    for packed in ("", ".gz", ".bz2", ".zst")
)
NEGATIVES = Schema(user="user_id", item="pos_item_id")  # fixed names; the list is `negatives`
Side = Literal["user", "item"]
SIDES: tuple[Side, Side] = ("user", "item")


@dataclass(frozen=True)
class Log:
    """An opened log: footers are read, types and file sizes are checked, no row is read yet."""

    path: str
    schema: Schema
    num_users: int
    num_items: int
    train: ParquetSplit
    val: ParquetSplit | None
    test: ParquetSplit | None
    test_negatives: ParquetSplit | None
    manifest: dict[str, Any] | None
    """Of a log that recpress wrote."""
    filesystem: pafs.FileSystem
    root: str | None
    """Folder of the log in `filesystem`; None for a single file or a glob."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Path -> what is wrong, of the files of train that were skipped."""

    def num_ids(self, side: Side) -> int:
        return self.num_users if side == "user" else self.num_items

    def column(self, side: Side) -> str:
        return self.schema.user if side == "user" else self.schema.item

    def counts(self, side: Side) -> np.ndarray:
        """How often each id occurs in train, (num_ids,) int64: from the vocabulary, else counted in a stream.

        Of a log that extends another, the vocabulary counts the rows of both.
        """
        if (table := self._vocabulary(side, ["count"])) is not None:
            return table.column("count").combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
        counts = np.zeros(self.num_ids(side), dtype=np.int64)
        column = self.column(side)
        for _, data in iter_row_groups(self.train, [column]):
            found = np.bincount(data[column])
            counts[: len(found)] += found
        return counts

    def vocabulary(self, side: Side) -> pa.Table | None:
        """Columns `raw` and `count`, row k is dense id k; None if the log has no raw ids."""
        return self._vocabulary(side, None)

    def _vocabulary(self, side: Side, columns: list[str] | None) -> pa.Table | None:
        if self.manifest is None or side not in self.manifest.get("vocabularies", {}):
            return None
        return self._side_table(f"vocabulary/{side}.parquet", side, columns)

    def vocabulary_fingerprint(self, side: Side) -> str:
        """Equal if dense ids mean the same: of the raw ids in order, of the hash, else of the number of ids alone."""
        if (hashed := self.hash_fingerprint(self.column(side))) is not None:
            return hashed
        if self.manifest is not None and side in (known := self.manifest.get("vocabularies", {})):
            return str(known[side]["fingerprint"])
        return hashlib.sha256(f"{side}: {self.num_ids(side)} dense ids".encode()).hexdigest()[:32]

    def hash_fingerprint(self, column: str) -> str | None:
        """As `vocabulary_fingerprint`, of a column whose raw ids are hashed while they are read; None of others."""
        if (found := self.hash_of(column)) is None:
            return None
        kind, size = found
        return hashlib.sha256(f"raw {kind} hashed into {size}".encode()).hexdigest()[:32]

    def hash_of(self, column: str) -> tuple[str | None, int | None] | None:
        """(`integers` or `text`, number of ids) of a column whose raw ids are hashed while they are read; None of
        others. 7 and "7" have different hashes."""
        read = self.train.columns.get(column)
        if read is None or not read.hashed:
            return None
        schema = next(file.schema for file in self.train.files if file.metadata)
        return kind_of_values(schema.field(column).type), read.limit

    def features(self, side: Side) -> pa.Table | None:
        """Side table of the users or the items, row k is dense id k; None if there is none."""
        if self.root is None:
            return None
        name = f"{side}s.parquet"
        if name not in list_folder(self.filesystem, self.root):
            return None
        if self.hash_fingerprint(self.column(side)) is not None:
            raise InputError(
                f"{self.root}/{name}: row k is of dense id k, but --schema.hashed hashes the {side}s; expected a log "
                "that `recpress ingest` numbered, or no such file"
            )
        return self._side_table(name, side)

    @property
    def sample_of(self) -> dict[str, Any] | None:
        """Of a log that `recpress sample` wrote: the `sample`, and address (`log`), `rows` and `files` of the log that
        it was drawn from."""
        return (self.manifest or {}).get("sample_of")

    @property
    def is_part(self) -> bool:
        """Whether train lacks rows of the log that it was drawn from, so that users have seen more items than it
        has."""
        return self.sample_of is not None and self.sample_of["sample"]["rate"] < 1

    def inputs(self) -> list[dict[str, Any]]:
        """Name, size, rows and fingerprint of each file of train, for manifests of artifacts that are made from it."""
        return self.train.describe_files()

    def _side_table(self, name: str, side: Side, columns: list[str] | None = None) -> pa.Table:
        path = f"{self.root}/{name}"
        table = read_whole(self.filesystem, path, columns)
        if table.num_rows != self.num_ids(side):
            raise InputError(f"{path}: {table.num_rows} rows; expected one for each of {self.num_ids(side)} {side}s")
        return table


def open_log(
    path: str | Path,
    schema: Schema | None = None,
    *,
    pairs: bool = True,
    skip_bad: bool = False,
    bad: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
) -> Log:
    """Opens a log: a folder, a Parquet file or a glob, local or as a URI of a filesystem that pyarrow knows.

    Args:
        schema: which columns mean what; by default that of the manifest, else `Schema()`.
        pairs: refuse a log that has no user or no item column (an empty name in its schema).
        skip_bad: skip incomplete files of train, instead of refusing the log. They keep their ordinals, so
            that the sample of the other files does not change.
        bad: files of train to skip in any case: `Log.bad_files` of another rank.
        only: the files of train to read, for a log that grows; by default all.

    Raises:
        InputError: the path does not exist, or has no rows; a file is incomplete, not Parquet, or not the one of the
            manifest; a column is missing or of a wrong type; the statistics show a null or a negative id.
    """
    filesystem, inner = resolve(path)
    root, manifest = None, None
    skipped = dict(bad or {})
    folders: dict[str, str | None] = {}
    kind = file_type(filesystem, inner)
    if kind == pafs.FileType.File or (kind == pafs.FileType.NotFound and is_glob(inner)):
        parts = {"train": expand(filesystem, inner)}
        if not parts["train"]:
            raise InputError(f"{path}: no file matches")
        above = inner.rpartition("/")[0] if kind == pafs.FileType.File else split_glob(filesystem, inner)[0]
        folders["train"] = partition_root(above)
    elif kind == pafs.FileType.Directory:
        root = inner
        found = list_folder(filesystem, inner)
        parts = {part: _one_form(filesystem, inner, found, part) for part in PARTS}
        folders = {part: _folder_of(files, inner) for part, files in parts.items()}
        if artifact.MANIFEST in found:
            manifest = artifact.read_manifest(path, KIND)
            folders = {}  # all columns are in the files
            _check_files(filesystem, inner, manifest, parts["train"] if skip_bad else (), skipped)
        elif artifact.UNFINISHED in found:
            raise InputError(
                f"{path}: incomplete: a run is writing this log, or failed to; expected a {artifact.MANIFEST}"
            )
        elif not parts["train"] and not any(parts.values()):
            parts["train"] = _dataset_files(filesystem, found)
            folders["train"] = partition_root(inner)
            _warn_of_folders(filesystem, inner, found, parts["train"])
        if not parts["train"]:
            problem = f"{path}: no train.parquet, train-*.parquet or train/*.parquet"
            if any(name.lower().endswith(_TEXT_SUFFIXES) and not is_hidden(name) for name in found):
                raise InputError(f"{problem}{INGEST_HINT}")
            raise InputError(f"{problem}; other names need a glob")
        if manifest is None:
            _warn_of_unread(filesystem, inner, found, parts)
    else:
        raise InputError(f"{path}: no such file or folder")
    if only is not None:
        parts["train"] = list(only)
    if schema is None:
        schema = schema_from_manifest(manifest) if manifest else Schema()
    if pairs and not (schema.user and schema.item):
        raise InputError(
            f"{path}: the log has no {'item' if schema.user else 'user'} column, which this command needs "
            "(open_log(..., pairs=False) reads a log of features alone)"
        )
    hashed = hash_sizes(str(path), schema, manifest)
    unnamed = [name for name in hashed if name not in (schema.user, schema.item, *schema.categorical)]
    schema = replace(schema, categorical=(*schema.categorical, *unnamed))
    opened = {
        part: _open_part(filesystem, part, files, schema, skip_bad, skipped, folders.get(part), hashed)
        for part, files in parts.items()
        if files
    }
    for part, rows in opened.items():
        if rows.num_rows == 0:
            raise InputError(f"{rows.files[0].path}: no rows in {part}; expected at least one")
    opened = _same_times(opened, schema)
    check_hashed(opened, schema, NEGATIVES, hashed)
    users, items = _sizes(opened, schema, manifest, hashed)
    features = {name: entry["num_ids"] for name, entry in (manifest or {}).get("features", {}).items()}
    limits = features | hashed | {schema.user: users, schema.item: items}
    held_out = {NEGATIVES.user: users, NEGATIVES.item: items, "negatives": items}
    opened = {
        part: _limited(rows, held_out, NEGATIVES) if part == "test_negatives" else _limited(rows, limits, schema)
        for part, rows in opened.items()
    }
    return Log(
        path=str(path),
        schema=schema,
        num_users=users,
        num_items=items,
        train=opened["train"],
        val=opened.get("val"),
        test=opened.get("test"),
        test_negatives=opened.get("test_negatives"),
        manifest=manifest,
        filesystem=filesystem,
        root=root,
        bad_files=skipped,
    )


def schema_from_manifest(manifest: dict[str, Any]) -> Schema:
    fields = manifest["schema"]
    lists = {name: tuple(fields.get(name, ())) for name in ("categorical", "floats", "hashed")}
    return Schema(**{**fields, **lists})


def files_of(filesystem: pafs.FileSystem, found: dict[str, pafs.FileInfo], part: str) -> list[str]:
    """Paths of the files of a part, by the entries of the log's folder; without hidden ones (`.x`, `_x`)."""
    return sorted(path for form in _forms(filesystem, found, part).values() for path in form)


def _one_form(filesystem: pafs.FileSystem, root: str, found: dict[str, pafs.FileInfo], part: str) -> list[str]:
    """As `files_of`. Raises InputError if there is more than one of `part.parquet`, `part-*.parquet` and `part/`."""
    forms = _forms(filesystem, found, part)
    if len(forms) > 1:
        named = " and ".join(form if form in found else files[0].rpartition("/")[2] for form, files in forms.items())
        raise InputError(
            f"{shown(filesystem, root)}: both {named} are {part}; expected only one (move or remove the other)"
        )
    return sorted(path for form in forms.values() for path in form)


def _forms(filesystem: pafs.FileSystem, found: dict[str, pafs.FileInfo], part: str) -> dict[str, list[str]]:
    """Files of a part by form: one file, numbered files or a folder."""
    forms: dict[str, list[str]] = {}
    for name, info in found.items():
        if info.type == pafs.FileType.File and name.endswith(".parquet"):
            stem = name.removesuffix(".parquet")
            for alias in _NAMES[part]:
                if stem == alias:
                    forms[name] = [info.path]
                elif stem.startswith(f"{alias}-"):
                    forms.setdefault(f"{alias}-*.parquet", []).append(info.path)
        elif info.type == pafs.FileType.Directory and name in _NAMES[part]:
            forms[name] = [path for path in walk(filesystem, info.path) if _is_parquet(path)]
    return {form: files for form, files in forms.items() if files}


def _is_parquet(path: str) -> bool:
    """By its name; Hive's own files have no suffix."""
    name = path.rpartition("/")[2].lower()
    return name.endswith((".parquet", ".parq", ".pq")) or "." not in name


def _folder_of(files: Sequence[str], root: str) -> str | None:
    """The folder below which folder names hold values of columns, for the files of a part; None without folders."""
    below = {path[len(root) :].lstrip("/").partition("/") for path in files}
    return f"{root}/{next(iter(below))[0]}" if any(mark for _, mark, _ in below) else None


def _dataset_files(filesystem: pafs.FileSystem, found: dict[str, pafs.FileInfo]) -> list[str]:
    """Paths of the files of a folder of Spark or Hive: `part-*` and `column=value/...`, all of them train."""
    files = []
    for name, info in found.items():
        if info.type == pafs.FileType.Directory and is_partition(name) and not is_hidden(name):
            files += [path for path in walk(filesystem, info.path) if _is_parquet(path)]
        elif info.type == pafs.FileType.File and name.startswith("part-") and _is_parquet(name):
            files.append(info.path)
    return sorted(files)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn_of_unread(
    filesystem: pafs.FileSystem, root: str, found: dict[str, pafs.FileInfo], parts: dict[str, list[str]]
) -> None:
    """Warn of files that may be rows of the log but are not read."""
    read = {path for files in parts.values() for path in files}
    known = [f"{side}s.parquet" for side in SIDES]
    unread = [
        name
        for name, info in found.items()
        if info.type == pafs.FileType.File and name.lower().endswith((".parquet", ".parq", ".pq"))
        if info.path not in read and name not in known and not is_hidden(name)
    ]
    for part, names in _NAMES.items():
        for name in names:
            if parts[part] and name in found and found[name].type == pafs.FileType.Directory:
                unread += [
                    path[len(root) :].lstrip("/") for path in walk(filesystem, found[name].path) if path not in read
                ]
    if unread:
        logger.warning(
            "%s: not read, by their names: %s; docs/train/log.md lists the names that a log has",
            shown(filesystem, root),
            _some(unread),
        )


def _warn_of_folders(
    filesystem: pafs.FileSystem, root: str, found: dict[str, pafs.FileInfo], files: Sequence[str]
) -> None:
    """Warn of folders that are not read, in a folder of Spark or Hive."""
    folders = [
        name
        for name, info in found.items()
        if info.type == pafs.FileType.Directory and not is_hidden(name) and not is_partition(name)
    ]
    if files and folders:
        logger.warning(
            "%s: read as a folder of Spark or Hive, from %s on; its other folders are not read: %s",
            shown(filesystem, root),
            files[0][len(root) :].lstrip("/"),
            _some(folders),
        )


def _check_files(
    filesystem: pafs.FileSystem, root: str, manifest: dict[str, Any], may_fail: Sequence[str], bad: dict[str, str]
) -> None:
    """Raises InputError if a file differs from the manifest; one of `may_fail` with another size becomes bad."""
    named = [file["name"] for file in manifest["files"]]
    named += [entry["vocabulary"] for entry in manifest.get("features", {}).values() if entry.get("vocabulary")]
    for name in named:
        artifact.check_inside(name, shown(filesystem, root))
    sizes = {file["name"]: file["size"] for file in manifest["files"]}
    infos = file_infos(filesystem, [f"{root}/{name}" for name in sizes])
    for (name, size), info in zip(sizes.items(), infos, strict=True):
        if info.type != pafs.FileType.File:
            raise InputError(f"{shown(filesystem, root)}/{name}: missing; the manifest names it")
        if info.size != size:
            problem = f"{shown(filesystem, root)}/{name}: {info.size} bytes; the manifest says {size}"
            if info.path not in may_fail:
                raise InputError(problem)
            bad[info.path] = problem


def _open_part(
    filesystem: pafs.FileSystem,
    part: str,
    files: list[str],
    schema: Schema,
    skip: bool,
    bad: dict[str, str],
    folders: str | None,
    hashed: Mapping[str, int],
) -> ParquetSplit:
    user, item = schema.user in hashed, schema.item in hashed
    if part == "test_negatives":
        columns = [Column(NEGATIVES.user, "id", hashed=user)]
        columns += [Column(NEGATIVES.item, "id", hashed=item), Column("negatives", "ids", hashed=item)]
        return open_split(filesystem, files, columns)
    ids = [Column(name, "id", hashed=name in hashed) for name in (schema.user, schema.item) if name]
    rest = [Column(schema.label, "label")] if schema.label else []
    rest += [Column(schema.time, "time")] if schema.time else []
    rest += [Column(name, "categorical", hashed=name in hashed) for name in schema.categorical]
    rest += [Column(name, "float") for name in schema.floats]
    if part == "train":
        return open_split(filesystem, files, ids + rest, skip=skip, bad=bad, folders=folders)
    return open_split(
        filesystem, files, ids, rest, folders=folders
    )  # held-out rows may lack columns that only training needs


def _same_times(opened: dict[str, ParquetSplit], schema: Schema) -> dict[str, ParquetSplit]:
    """The same rows, the times of all parts in one unit."""
    name = schema.time or ""
    having = {part: rows for part, rows in opened.items() if name in rows.columns}
    if not having:
        return opened
    time = common_time(name, [(rows.where_file(0), str(rows.columns[name].time)) for rows in having.values()])
    return opened | {
        part: replace(rows, columns=rows.columns | {name: replace(rows.columns[name], time=time)})
        for part, rows in having.items()
    }


def _sizes(
    opened: dict[str, ParquetSplit], schema: Schema, manifest: dict[str, Any] | None, hashed: Mapping[str, int]
) -> tuple[int, int]:
    """Number of users and of items: of the hash, of the manifest, else of the largest id."""
    negatives = opened["test_negatives"].num_rows if "test_negatives" in opened else 0
    total = max(negatives, sum(rows.num_rows for part, rows in opened.items() if part != "test_negatives"))

    def size(column: str, known: str, in_negatives: Sequence[str]) -> int:
        if column in hashed:
            return hashed[column]
        if manifest is not None:
            return int(manifest[known])
        names = {part: in_negatives if part == "test_negatives" else [column] for part in opened}
        return max(_num_dense(rows, name, total) for part, rows in opened.items() for name in names[part] if name)

    users = size(schema.user, "num_users", [NEGATIVES.user]) if schema.user or manifest else 0
    items = size(schema.item, "num_items", [NEGATIVES.item, "negatives"]) if schema.item or manifest else 0
    return users, items


def _num_dense(rows: ParquetSplit, column: str, total: int) -> int:
    """The largest id + 1. Raises InputError if an id is too large to be dense: a hash, or a key of a database."""
    largest, group = largest_id(rows, column)
    if group is not None and not is_dense(largest, total):
        raise InputError(
            f"{rows.where(group)}, column '{column}': id {largest} in a log of {total} rows; expected dense ids, "
            "numbered from 0; run `recpress ingest`, which numbers raw ids"
        )
    return largest + 1


def _limited(rows: ParquetSplit, limits: dict[str, int], schema: Schema) -> ParquetSplit:
    """The same rows with the column of users, and with the number of ids of each column if it is known."""
    columns = {name: replace(column, limit=limits.get(name)) for name, column in rows.columns.items()}
    return replace(rows, columns=columns, user=schema.user or None)
