"""Files on any filesystem that pyarrow or fsspec knows: local paths and URIs, folders and globs.

Operations on remote filesystems are retried (`retried`), which defines how often and how long.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from fnmatch import translate
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WILD = re.compile(r"[*?\[]")
_LONGEST_WAIT = 8.0
_ALIASES = {"s3a": "s3", "s3n": "s3"}  # how Hadoop names it
_OF_PYARROW = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_FSSPEC = "py::fsspec+"  # how pyarrow names what it reaches by fsspec
_SECRET_OPTION = re.compile(
    r"[?&]([\w.-]*(?:key|secret|token|sig|signature|password|credential)[\w.-]*)=", re.IGNORECASE
)
_S3_OPTIONS = ("region", "scheme", "endpoint_override")
_FINAL = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_\w+|INVALID_\w+|SIGNATURE_\w+|PERMANENT_REDIRECT|UNRECOGNIZED_CLIENT"
    r"|[A-Z_]+ \(HTTP status (3\d\d|4(?!08|29)\d\d)\))"
)


def request_timeout() -> float:
    """Seconds that a request to an object store may make no progress (RECPRESS_STORAGE_TIMEOUT, 10)."""
    return _seconds("RECPRESS_STORAGE_TIMEOUT", 10.0)


def patience() -> float:
    """Seconds after its first failure in which an operation is retried (RECPRESS_STORAGE_PATIENCE, 120)."""
    return _seconds("RECPRESS_STORAGE_PATIENCE", 120.0)


def resolve(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """Filesystem and the path in it, of a local path or a URI: of a scheme that pyarrow knows (`file://`, `s3://`,
    `gs://`, `hdfs://`, `abfs://`), else of one that fsspec knows, if that is installed (`zip://a.parquet::/b.zip`).
    """
    text = str(path)
    if not text.strip():
        raise InputError("an empty path; expected a file, a folder or an address")
    scheme, mark, rest = text.partition("://")
    if mark:
        text = f"{_ALIASES.get(scheme.lower(), scheme.lower())}{mark}{rest}"
    if "://" not in text:
        return pafs.LocalFileSystem(), text.rstrip("/") or "/"
    _refuse_secrets(text)
    if "::" in text or text.partition("://")[0] not in _OF_PYARROW:
        return _resolve_fsspec(text)
    # A wildcard is not valid in a URI, so only the part before it is parsed. In a URI `?` begins the options, never a
    # wildcard.
    address, mark, options = text.partition("?")
    if address.startswith("s3://"):
        return _resolve_s3(address, options)
    fixed, rest = split_wild(address)
    try:
        filesystem, base = pafs.FileSystem.from_uri(fixed.rstrip("/") + mark + options)
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{path}: cannot be opened: {first_line(error)}") from error
    return filesystem, (f"{base}/{rest}" if rest else base.rstrip("/"))


def is_remote(path: str | Path) -> bool:
    """Whether it is the URI of a filesystem other than the local one."""
    return "://" in str(path) and not str(path).startswith("file://")


def shown(filesystem: pafs.FileSystem, path: str) -> str:
    """A path in a filesystem as errors name it: `s3://bucket/key`; local ones as they are."""
    if filesystem.type_name == "s3":
        return f"s3://{path}"
    if filesystem.type_name.startswith(_FSSPEC):
        return f"{filesystem.type_name.removeprefix(_FSSPEC)}://{path.lstrip('/')}"
    return path


def retried(filesystem: pafs.FileSystem, where: str, call: Callable[[], T]) -> T:
    """The result of `call`; on a remote filesystem transient failures are retried, with growing waits.

    Transient: no connection, a timeout, a reset, 5xx, 429. Not transient: no such file, no permission. Data that does
    not parse is read once more, because the transfer may have damaged it.

    Args:
        where: the file, for the warning that each failure logs.

    Raises:
        OSError: the last failure, with the number of tries; other errors of `call` as they are.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return call()
    tries, wait, began = 0, 0.25, 0.0
    while True:
        try:
            return call()
        except (OSError, pa.ArrowException) as error:
            tries += 1
            began = began or time.monotonic()
            damaged = not isinstance(error, OSError)
            if is_final(error) or (damaged and tries > 1):
                raise
            left = began + patience() - time.monotonic()
            if left <= 0:
                raise OSError(f"{first_line(error)} (tried {tries} times)") from error
            pause = min(random.uniform(0.5, 1.5) * wait, left)
            logger.warning("%s: %s; retrying in %.1f s", where, first_line(error), pause)
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def is_final(error: BaseException) -> bool:
    """Whether a retry cannot help."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
    return isinstance(error, kinds) or _FINAL.search(str(error)) is not None


def file_infos(filesystem: pafs.FileSystem, paths: Sequence[str]) -> list[pafs.FileInfo]:
    """Info of each path. Raises InputError if the filesystem does not answer."""
    return _asked(filesystem, paths[0] if paths else "", lambda: filesystem.get_file_info(list(paths)))


def file_type(filesystem: pafs.FileSystem, path: str) -> pafs.FileType:
    """File, directory or nothing. Raises InputError if the filesystem does not answer."""
    return file_infos(filesystem, [path])[0].type


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether a file or folder has this name. Raises InputError if the filesystem does not answer."""
    return file_type(filesystem, path) != pafs.FileType.NotFound


def is_glob(path: str) -> bool:
    return _WILD.search(path) is not None


def is_pattern(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether a path is a glob: it has wildcards, and nothing has this name."""
    return is_glob(path) and not exists(filesystem, path)


def is_hidden(name: str) -> bool:
    """Whether a name is a writer's own (`_SUCCESS`, `_temporary`, `.part-0.crc`), which readers skip."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def split_glob(filesystem: pafs.FileSystem, pattern: str) -> tuple[str, str]:
    """The folder before the first part that is a wildcard and not the name of a file or folder, and the rest."""
    base, rest = split_wild(pattern)
    while "/" in rest:
        part, _, after = rest.partition("/")
        literal = f"{base}/{part}" if base or pattern.startswith("/") else part
        if not exists(filesystem, literal):
            break
        more, rest = split_wild(after)
        base = f"{literal}/{more}".rstrip("/")
    return base.rstrip("/") or ("/" if pattern.startswith("/") else "."), rest


def expand(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    """Paths of the files that match, sorted: the file of this name, else those of the glob.

    `*` and `?` stay within a folder, and match hidden names (`is_hidden`) only if the pattern spells out their first
    character.
    """
    if file_type(filesystem, pattern) == pafs.FileType.File:
        return [pattern]
    if not is_pattern(filesystem, pattern):
        return []
    base, rest = split_glob(filesystem, pattern)
    deep = "/" in rest
    infos = _selected(filesystem, base, deep)
    parts = [(part, re.compile(translate(part))) for part in rest.split("/")]

    def fits(part: str, compiled: re.Pattern[str], name: str) -> bool:
        return compiled.match(name) is not None and (not is_hidden(name) or part[:1] == name[:1])

    matches = []
    for info in infos:
        below = info.path.removeprefix(base if base != "." else "").lstrip("/").removeprefix("./").split("/")
        if (
            info.type == pafs.FileType.File
            and len(below) == len(parts)
            and all(fits(*part, name) for part, name in zip(parts, below, strict=True))
        ):
            matches.append(info.path)
    return sorted(matches)


def list_folder(filesystem: pafs.FileSystem, path: str) -> dict[str, pafs.FileInfo]:
    """Name -> info of the entries of a folder, sorted by name; empty if the folder is absent."""
    infos = _selected(filesystem, path, False)
    return {info.base_name: info for info in sorted(infos, key=lambda info: info.path)}


def list_files(filesystem: pafs.FileSystem, path: str) -> dict[str, int]:
    """Name below the folder -> size in bytes, of all files at any depth; empty if the folder is absent."""
    infos = _selected(filesystem, path, True)
    names = {info.path[len(path) :].lstrip("/"): info.size for info in infos if info.type == pafs.FileType.File}
    return dict(sorted(names.items()))


def walk(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """Paths of all files below a folder that are not hidden and not in a hidden folder, sorted."""
    infos = _selected(filesystem, path, True)
    return sorted(
        info.path
        for info in infos
        if info.type == pafs.FileType.File
        and info.base_name
        and not any(map(is_hidden, info.path[len(path) :].strip("/").split("/")))
    )


INGEST_HINT = "; `recpress ingest` reads other formats"


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(": ") if str(error) else type(error).__name__


def _selected(filesystem: pafs.FileSystem, base: str, deep: bool) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(base, recursive=deep, allow_not_found=True)
    return _asked(filesystem, base, lambda: filesystem.get_file_info(selector))


def _asked(filesystem: pafs.FileSystem, path: str, call: Callable[[], T]) -> T:
    where = shown(filesystem, path)
    try:
        return retried(filesystem, where, call)
    except OSError as error:
        raise InputError(f"{where}: cannot be looked up: {first_line(error)}") from error


def _refuse_secrets(text: str) -> None:
    """Addresses are logged, and stored in manifests."""
    expected = "expected them where the filesystem reads them, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if secret := re.search(r"([\w+.-]+://)[^/@]*:[^/@]*@([^?]*)", text):
        raise InputError(
            f"{text[: secret.start()]}{secret[1]}…@{secret[2]}: credentials in an address would reach logs and "
            f"manifests; {expected}"
        )
    if option := _SECRET_OPTION.search(text):
        raise InputError(
            f"{text.partition('?')[0]}: option {option[1]!r}: credentials in an address would reach logs and "
            f"manifests; {expected}"
        )


def _resolve_fsspec(address: str) -> tuple[pafs.FileSystem, str]:
    scheme = address.partition("://")[0].partition("::")[0]
    try:
        import fsspec
    except ImportError:
        raise InputError(
            f"{address}: scheme '{scheme}', expected one of {', '.join(_OF_PYARROW)}, or an installed fsspec"
        ) from None
    fixed, rest = split_wild(address) if "::" not in address else (address, "")
    try:
        # No cache of listings: logs get new files, and artifacts are listed after they were written.
        filesystem, base = fsspec.core.url_to_fs(fixed, use_listings_cache=False)
        made = pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    except ImportError as error:  # fsspec knows the scheme, and names the package that is missing
        raise InputError(f"{address}: {first_line(error)}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{address}: cannot be opened: {first_line(error)}") from error
    base = base.rstrip("/")
    return made, (f"{base}/{rest}" if rest else base)


def _resolve_s3(address: str, options: str) -> tuple[pafs.FileSystem, str]:
    path = address.removeprefix("s3://").rstrip("/")
    bucket = path.partition("/")[0]
    if not bucket or re.search(r"[@:]", bucket):
        raise InputError("s3://…: expected s3://BUCKET/KEY, without credentials or a host")
    given = dict(parse_qsl(options))
    if odd := sorted(given.keys() - set(_S3_OPTIONS)):
        raise InputError(f"{address}: option {odd[0]!r}, expected one of {', '.join(_S3_OPTIONS)}")
    endpoint = given.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme = given.get("scheme")
    if "://" in endpoint:
        parts = urlsplit(endpoint)
        scheme, endpoint = scheme or parts.scheme, parts.netloc
    region = given.get("region")
    try:
        if region is None and endpoint:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        elif region is None:
            region = _region_of(bucket)
        return _s3(region, endpoint, scheme or "https", request_timeout()), path
    except (ValueError, OSError) as error:
        raise InputError(f"{address}: cannot be opened: {first_line(error)}") from error


@functools.cache
def _region_of(bucket: str) -> str:
    """The region of a bucket from AWS, or that of the environment if AWS does not respond."""
    try:
        return str(pafs.resolve_s3_region(bucket))
    except OSError:
        if named := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            return named
        raise


@functools.cache
def _s3(region: str, endpoint: str, scheme: str, timeout: float) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=endpoint or None,
        scheme=scheme,
        request_timeout=timeout,
        connect_timeout=timeout,
        allow_delayed_open=True,  # a small file is then one request
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),  # of one request; `retried` is of an operation
    )


def split_wild(pattern: str) -> tuple[str, str]:
    """The folders before the first part that has a wildcard, and the rest."""
    parts = pattern.split("/")
    first = next((place for place, part in enumerate(parts) if is_glob(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={text}: expected a number of seconds above 0")
    return value
