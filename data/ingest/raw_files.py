"""Finds the files that `ingest` reads: a file, a glob, a folder with or without Hive partitions, a zip archive."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import fs as pafs

from recpress.data.dataset.files import expand, file_type, first_line, is_pattern, list_folder, resolve
from recpress.data.errors import InputError

_PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.zst", ".xz", ".txz", ".7z", ".rar")
_PARTITION = re.compile(r"[^=/]+=[^/]*")
_TABLE_FORMATS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


@dataclass(frozen=True)
class RawFile:
    """A file to read."""

    filesystem: pafs.FileSystem
    path: str
    where: str
    """Its name in errors."""
    partitions: tuple[tuple[str, str | None], ...] = ()
    """Keys and values of the Hive partitions that its path names (`dt=2024-01-01/`)."""


@dataclass(frozen=True)
class RowNumbers:
    """Rows of a file, as errors name them: `line 3` of text, counted from 1; `row 2` of Parquet, from 0."""

    first: int = 0
    """Ordinal of the first row, among the rows of the file."""
    line_of: Callable[[int], int] | None = None
    """The line on which the row with an ordinal begins, counted from 1; None: the file has no lines."""

    places: np.ndarray | None = None
    """Of the rows, counted from `first`, if they are not consecutive."""

    def name(self, place: int) -> str:
        """What errors call one of these rows, the first of which is at place 0."""
        row = self.first + (place if self.places is None else int(self.places[place]))
        return f"row {row}" if self.line_of is None else f"line {self.line_of(row)}"

    def each(self, places: np.ndarray) -> RowNumbers:
        """The rows at these places, which may repeat: one for each value of rows with several."""
        return replace(self, places=places)


@dataclass(frozen=True)
class RawInput:
    """The input of `ingest`, resolved."""

    name: str
    filesystem: pafs.FileSystem
    path: str
    archive: tuple[pafs.FileSystem, str] | None = None
    """Filesystem and path of the zip file that `filesystem` reads."""

    @property
    def is_folder(self) -> bool:
        return file_type(self.filesystem, self.path) == pafs.FileType.Directory

    def file(self, path: str) -> RawFile:
        """A file of this input, with the partitions that its path names."""
        where = path if self.archive is None else f"{self.archive[1]}/{path}"
        names = [part for part in path.split("/")[:-1] if _PARTITION.fullmatch(part)]
        keys = [name.partition("=")[0] for name in names]
        if not keys:
            return RawFile(self.filesystem, path, where)
        reader = pads.HivePartitioning(pa.schema([(key, pa.string()) for key in dict.fromkeys(keys)]))
        values = pads.get_partition_keys(reader.parse("/".join([*names, "file"])))
        return RawFile(self.filesystem, path, where, tuple(values.items()))

    def files(self) -> dict[str, RawFile]:
        """Name -> file: those of the folder, the file, or those that match."""
        if self.is_folder:
            return self._files(self.path)
        return {path.rpartition("/")[2]: self.file(path) for path in self._matching()}

    def _matching(self) -> list[str]:
        """The file, which may have `[` in its name, or the files that match."""
        if file_type(self.filesystem, self.path) == pafs.FileType.File:
            return [self.path]
        return expand(self.filesystem, self.path)

    def home(self, is_part: Callable[[str], bool]) -> tuple[str, dict[str, RawFile]]:
        """The folder with files for which `is_part` is true: the input, its folder, or one of its subfolders.

        Returns the folder and its files by name; no files if there is no such folder.
        """
        folder = self.path if self.is_folder else self.path.rpartition("/")[0] or "."
        files = self._files(folder)
        if any(map(is_part, files)) or not self.is_folder:
            return folder, files
        below = [(path, found) for path in self._subfolders(folder) if any(map(is_part, found := self._files(path)))]
        if len(below) > 1:
            raise InputError(f"{self.name}: {below[0][0]} and {below[1][0]} both have such files; choose one of them")
        return below[0] if below else (folder, {})

    def gather(self, suffixes: Sequence[str]) -> list[RawFile]:
        """The file, the files that match, or those below the folder that have one of the suffixes (also compressed).
        If none has, those that have no suffix at all, as Hive writes them.

        A folder has either files, or Hive partitions of any depth, or one more folder. Names that begin with `.` or `_`
        are temporary files of a writer.

        Raises:
            InputError: no such file; files in several folders, so that the input is ambiguous.
        """
        if not self.is_folder:
            paths = self._matching()
            if not paths:
                raise InputError(f"{self.name}: no file; expected {_listed(suffixes)}, or a folder or glob of them")
            for path in paths:
                if path.lower().endswith(_ARCHIVES) or (path.endswith(".zip") and self.archive is None and paths[1:]):
                    raise InputError(f"{path}: an archive; expected it unpacked, or one .zip file")
            return [self.file(path) for path in paths]
        found = self._below(self.path, suffixes) or self._below(self.path, ())
        if not found:
            raise InputError(f"{self.name}: no file; expected {_listed(suffixes)}")
        return [self.file(path) for path in found]

    def all_files(self) -> list[RawFile]:
        """All files below the folder that are not hidden; the file, or those that match."""
        if not self.is_folder:
            return list(self.files().values())
        folders = [self.path]
        for folder in folders:
            folders.extend(self._subfolders(folder))
        return [file for folder in folders for file in self._files(folder).values()]

    def short_name(self, file: RawFile) -> str:
        """The path of a file below the folder; the name of a file of a glob."""
        return file.path.removeprefix(self.path).lstrip("/") if self.is_folder else file.path.rpartition("/")[2]

    def _below(self, folder: str, suffixes: Sequence[str]) -> list[str]:
        here = [file.path for name, file in self._files(folder).items() if has_suffix(name, suffixes)]
        partitions: list[list[str]] = []
        others: list[list[str]] = []
        for path in self._subfolders(folder):
            if found := self._below(path, suffixes):
                (partitions if _PARTITION.fullmatch(path.rpartition("/")[2]) else others).append(found)
        partitioned = [path for found in partitions for path in found]
        places = [found for found in (here, *others, partitioned) if found]
        if len(places) > 1:
            raise InputError(
                f"{self.name}: files in several folders ({places[0][0]}, {places[1][0]}); choose one folder, or all "
                "files with a glob"
            )
        return places[0] if places else []

    def _files(self, folder: str) -> dict[str, RawFile]:
        entries = list_folder(self.filesystem, folder)
        for name, kind in _TABLE_FORMATS.items():
            if name in entries:
                raise InputError(f"{folder}: a {kind} table, whose files may have deleted rows; export it as Parquet")
        if {"data", "metadata"} <= entries.keys() and any(
            fnmatch(name, "*.metadata.json") for name in list_folder(self.filesystem, entries["metadata"].path)
        ):
            raise InputError(f"{folder}: an Iceberg table, whose files may have deleted rows; export it as Parquet")
        return {
            name: self.file(info.path)
            for name, info in entries.items()
            if info.type == pafs.FileType.File and not name.startswith((".", "_"))
        }

    def _subfolders(self, folder: str) -> list[str]:
        return [
            info.path
            for name, info in list_folder(self.filesystem, folder).items()
            if info.type == pafs.FileType.Directory and not name.startswith((".", "_"))
        ]


def open_input(name: str) -> RawInput:
    """The input of this name; a zip file is a folder. Raises InputError if there is none."""
    filesystem, path = resolve(name)
    kind = file_type(filesystem, path)
    if kind == pafs.FileType.File and path.lower().endswith(".zip"):
        from fsspec.implementations.zip import ZipFileSystem  # torch requires fsspec

        try:
            inside = ZipFileSystem(filesystem.open_input_file(path))
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{name}: not a readable zip file: {first_line(error)}") from error
        return RawInput(name, pafs.PyFileSystem(pafs.FSSpecHandler(inside)), "", (filesystem, path))
    if kind == pafs.FileType.File and path.lower().endswith(_ARCHIVES):
        raise InputError(f"{name}: an archive; expected it unpacked, or a .zip file")
    if kind == pafs.FileType.Directory and not list_folder(filesystem, path):
        raise InputError(f"{name}: an empty folder; expected files")
    return RawInput(name, filesystem, path)


def exists(place: RawInput) -> bool:
    return file_type(place.filesystem, place.path) != pafs.FileType.NotFound or is_pattern(place.filesystem, place.path)


def compression(name: str) -> str | None:
    """The compression of a file, as Arrow names it, by the suffix."""
    return next((packed for suffix, packed in _PACKED.items() if name.lower().endswith(suffix)), None)


def plain_name(name: str) -> str:
    """The name without the suffix of its compression."""
    return name[: name.rindex(".")] if compression(name) else name


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Whether the name has one of the suffixes; of none, whether it has no suffix."""
    plain = plain_name(name).lower()
    return plain.endswith(tuple(suffixes)) if suffixes else "." not in plain


def _listed(suffixes: Sequence[str]) -> str:
    return " or ".join("*" + suffix for suffix in suffixes)
