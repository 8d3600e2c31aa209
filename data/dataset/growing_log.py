"""A log that grows: new files of a folder or a glob, read once they are complete.

A file is complete when its Parquet footer can be read, which a writer writes last. Files whose names begin with a dot
or an underscore are temporary files of a writer. Files that were read are known by name, size and fingerprint, in
*rounds*: the files known at the start are round 0, and each later listing that finds new ones is another round.
Ordinals of files, of which the samples of their rows are functions, continue from round to round.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from recpress.data.dataset import artifact
from recpress.data.dataset.files import (
    expand,
    file_type,
    first_line,
    is_hidden,
    is_pattern,
    list_folder,
    resolve,
    shown,
)
from recpress.data.dataset.log import files_of
from recpress.data.dataset.parquet_split import ParquetSplit, SplitFile, groups_of, num_ids, open_file
from recpress.data.dataset.partitions import constants
from recpress.data.dataset.schema import unify
from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

Taken = dict[str, Any]
"""`name`, `size` and `fingerprint` of a file, as a checkpoint stores them."""


@dataclass
class GrowingLog:
    """The folder or glob of the train files of a log. Lists them; reads only footers and fingerprints.

    Raises:
        InputError: the path cannot grow: it is one file, or a log whose manifest lists its files.
    """

    path: str
    _unfinished: dict[str, int] = field(default_factory=dict, repr=False)
    """Name -> size, of files that had no footer in the last listing; -1 once a warning named them."""

    def __post_init__(self) -> None:
        self._filesystem, self._inner = resolve(self.path)
        self._glob = is_pattern(self._filesystem, self._inner)
        if self._glob:
            return
        if file_type(self._filesystem, self._inner) != pafs.FileType.Directory:
            raise InputError(f"{self.path}: cannot be followed; expected a folder, or a glob, in which files appear")
        if artifact.MANIFEST in list_folder(self._filesystem, self._inner):
            raise InputError(
                f"{self.path}: cannot be followed: its {artifact.MANIFEST} lists all of its files; expected a folder "
                "without one, or a glob"
            )

    def new_files(self, taken: Container[str] = ()) -> list[Taken]:
        """Complete files whose names are not in `taken`, by name.

        Raises InputError if the filesystem does not answer.
        """
        found = []
        for name in self._list():
            if name in taken or is_hidden(name.rsplit("/", 1)[-1]):
                continue
            try:
                file = open_file(self._filesystem, name)
                fingerprint = artifact.fingerprint(name, self._filesystem)
            except (InputError, OSError, pa.ArrowException) as error:
                self._warn_if_incomplete(name, error)
                continue
            self._unfinished.pop(name, None)
            found.append({"name": name, "size": file.size, "fingerprint": fingerprint})
        return found

    def _list(self) -> list[str]:
        if self._glob:
            return expand(self._filesystem, self._inner)
        return files_of(self._filesystem, list_folder(self._filesystem, self._inner), "train")

    def _warn_if_incomplete(self, name: str, error: Exception) -> None:
        """Warn, once, of a file that did not change between two listings and is still incomplete."""
        size = self._filesystem.get_file_info(name).size or 0
        before = self._unfinished.get(name)
        if before == size:
            logger.warning(
                "%s: skipped for now, incomplete Parquet file: %s", shown(self._filesystem, name), first_line(error)
            )
        self._unfinished[name] = -1 if before in (size, -1) else size


def open_round(
    base: ParquetSplit, before: Sequence[Taken], files: Sequence[Taken], *, any_id: Collection[str] = ()
) -> ParquetSplit:
    """The rows of the files of one round, read like those of `base`, the rows of round 0.

    Args:
        before: files of all earlier rounds. They are not opened, and need not exist any more.
        any_id: columns whose ids may be larger than those of round 0.

    Raises:
        InputError: a file is missing, has changed, or does not fit the log: a column is missing, or of another type.
    """
    opened = []
    names = [file["name"] for file in files]
    given = constants(names, base.folders) if base.folders is not None else {}
    for file in files:
        where = shown(base.filesystem, file["name"])
        opened.append(open_file(base.filesystem, file["name"], given.get(file["name"])))
        found = artifact.fingerprint(file["name"], base.filesystem)
        if found != file["fingerprint"]:
            raise InputError(
                f"{where}: has changed since it was listed (fingerprint {found}, was {file['fingerprint']}); expected "
                "a log to which files are only added"
            )
    schemas = [(shown(base.filesystem, file.path), file.schema) for file in opened]
    known = [replace(column, limit=None) if column.name in any_id else column for column in base.columns.values()]
    columns = unify(known, schemas)
    every = (*(SplitFile(file["name"], file["size"], None) for file in before), *opened)
    return replace(
        base,
        files=every,
        groups=groups_of(every, len(before)),
        columns={column.name: column for column in columns},
    )


def refuse_new_ids(rows: ParquetSplit, advice: Mapping[str, str]) -> None:
    """Search the footers for ids that are not below the limit of their column, before any row is trained on.

    Args:
        advice: column -> what to do about it, which ends the message.

    Raises:
        InputError: an id is too large. The message has its file, row group, row and value, and the advice.
    """
    for name, what in advice.items():
        column = rows.columns[name]
        free = replace(rows, columns=rows.columns | {name: replace(column, limit=None)})
        if column.limit is None or num_ids(free, name) <= column.limit:
            continue
        for group in rows.groups:
            if num_ids(replace(free, groups=(group,)), name) > column.limit:
                try:
                    rows.read(group, [name])
                except InputError as error:
                    raise InputError(f"{error}; {what}") from error
