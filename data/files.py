"""Files on any filesystem that pyarrow knows: local paths and URIs, folders and globs."""

from __future__ import annotations

import re
from fnmatch import translate
from pathlib import Path

from pyarrow import fs as pafs
from recpress.data.errors import InputError

_WILD = re.compile(r"[*?\[]")


def resolve(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """Filesystem and the path in it, of a local path or a URI (`file://`, `s3://`, `gs://`, `hdfs://`,
    `abfs://`)."""
    text = str(path)
    if "://" not in text:
        return pafs.LocalFileSystem(), text.rstrip("/") or "/"
    if secret := re.match(r"(\w+://)[^/@]*:[^/@]*@(.*)", text):
        raise InputError(
            f"{secret[1]}…@{secret[2]}: credentials in an address would reach logs and manifests; expected them where "
            "the filesystem looks, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    # A wildcard is no URI, so only what stands before it is parsed. `?` begins the options of a URI, never a
    # wildcard.
    address, mark, options = text.partition("?")
    fixed, rest = _split_wild(address)
    try:
        filesystem, base = pafs.FileSystem.from_uri(fixed.rstrip("/") + mark + options)
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{path}: cannot be opened: {_first_line(error)}") from error
    return filesystem, (f"{base}/{rest}" if rest else base.rstrip("/"))


def is_glob(path: str) -> bool:
    return _WILD.search(path) is not None


def expand(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    """Paths of the files that match, sorted. `*` and `?` stay within a folder."""
    if not is_glob(pattern):
        return [pattern] if filesystem.get_file_info(pattern).type == pafs.FileType.File else []
    base, rest = _split_wild(pattern)
    base = base.rstrip("/") or ("/" if pattern.startswith("/") else ".")
    deep = "/" in rest
    infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=deep, allow_not_found=True))
    parts = [re.compile(translate(part)) for part in rest.split("/")]
    matches = []
    for info in infos:
        below = info.path.removeprefix(base if base != "." else "").lstrip("/").removeprefix("./").split("/")
        if (
            info.type == pafs.FileType.File
            and len(below) == len(parts)
            and all(part.match(name) for part, name in zip(parts, below, strict=True))
        ):
            matches.append(info.path)
    return sorted(matches)


def list_folder(filesystem: pafs.FileSystem, path: str) -> dict[str, pafs.FileInfo]:
    """Name -> info of what lies in a folder, sorted by name; empty where the folder is absent."""
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info for info in sorted(infos, key=lambda info: info.path)}


def _split_wild(pattern: str) -> tuple[str, str]:
    """The folders before the first part that has a wildcard, and the rest."""
    parts = pattern.split("/")
    first = next((place for place, part in enumerate(parts) if is_glob(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
