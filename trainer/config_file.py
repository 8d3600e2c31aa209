"""A TOML file as command-line arguments of a config dataclass.

The command line is the only parser of values: a file is checked for keys and types, then each key becomes the
argument `--section.key value`, unless the command line names the same one.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from recpress.data.errors import InputError

logger = logging.getLogger(__name__)
Section = TypeVar("Section")

RENAMED = {
    "stream.lanes": "stream.interleave",
    "stream.ready": "stream.prefetch_batches",
    "stream.threads": "stream.num_threads",
    "follow.on": "follow.online",
    "tables.plus_dim": "tables.residual_dim",
    "hash.private": "hash.exclusive_share",
    "hash.power": "hash.count_exponent",
    "hash.ways": "hash.rows_per_id",
    "private": "exclusive_share",
    "privates": "exclusive_shares",
    "power": "count_exponent",
    "powers": "count_exponents",
    "ways": "rows_per_id",
}
"""Deprecated option -> its name now. Command lines and TOML files accept the old name for one release, with a warning.
A name in a section also matches within another section (`train.stream.lanes`), a name without a section only at the
start. The name of a section matches all options in it."""

RENAMED_VALUES = {
    "tables.strategy": {"init-train": "warm-start", "init-freeze": "frozen", "init-freeze-plus": "frozen+residual"},
}
"""Option -> deprecated value -> its name now, accepted likewise."""

_STAGES = ("factorize", "hash", "train", "evaluate")


def current_name(option: str) -> str:
    """The name now of an option, such as `stream.lanes`; the same name unless it is in `RENAMED`."""
    for old, new in RENAMED.items():
        start = "(?<![^.])" if "." in old else "^"
        option = re.sub(rf"{start}{re.escape(old)}(?![^.])", new, option)
    return option


def current_value(option: str, value: Any) -> Any:
    """The name now of a value of an option; the same value unless it is in `RENAMED_VALUES`."""
    for name, values in RENAMED_VALUES.items():
        if isinstance(value, str) and f".{option}".endswith(f".{name}"):
            return values.get(value, value)
    return value


def current_names(config: Mapping[str, Any], source: str = "", *, warn: bool = False) -> dict[str, Any]:
    """A nested configuration with the current names of its options, such as one that an earlier release stored.

    Args:
        source: how messages name what `config` was read from.
        warn: log a warning for each deprecated name.

    Raises:
        InputError: `config` has an option under both its old and its current name.
    """
    result: dict[str, Any] = {}

    def copy(section: Mapping[str, Any], prefix: tuple[str, ...]) -> None:
        for key, value in section.items():
            path = (*prefix, key)
            if isinstance(value, Mapping) and value:
                copy(value, path)
                continue
            old = ".".join(path).replace("-", "_")
            new = current_name(old)
            if new != old:
                path = tuple(new.split("."))
                if warn:
                    _warn(f"{source}: '{old}'", f"'{new}'")
            parent = result
            for name in path[:-1]:
                parent = parent.setdefault(name, {})
            if path[-1] in parent:
                raise InputError(f"{source}: '{new}' is set twice, once by its old name; remove one")
            parent[path[-1]] = current_value(new, value)
            if warn and parent[path[-1]] != value:
                _warn(f"{source}: '{new} = {value}'", repr(parent[path[-1]]))

    copy(config, ())
    return result


def current_arguments(command_line: Sequence[str]) -> list[str]:
    """`command_line` with the current names of its options. Logs a warning for each deprecated name.

    Raises InputError if an option is under both its old and its current name.
    """
    found: list[str] = []
    renamed: dict[str, str] = {}  # current option -> the flag with its old name
    kept: dict[str, str] = {}  # option -> its flag, which has the current name
    for argument in command_line:
        flag, equals, value = argument.partition("=")
        section, dot, option = flag.removeprefix("--").replace("-", "_").rpartition(".")
        negated = "no_" if option.startswith("no_") else ""
        old = section + dot + option.removeprefix(negated)
        new = current_name(old) if flag.startswith("--") else old
        if flag.startswith("--"):
            (kept if new == old else renamed)[new] = flag
            if new in kept and new in renamed:
                raise InputError(f"{kept[new]} is set twice, once by its old name {renamed[new]}; remove one")
        if new != old:
            section, dot, option = new.replace("_", "-").rpartition(".")
            current = f"--{section}{dot}{negated.replace('_', '-')}{option}"
            _warn(flag, current)
            flag, argument = current, current + equals + value
        if not equals and not argument.startswith("--") and found:
            argument = _current_argument(found[-1], argument)
        elif equals:
            argument = flag + equals + _current_argument(flag, value)
        found.append(argument)
    return found


def _current_argument(flag: str, value: str) -> str:
    current = current_value(flag.removeprefix("--").replace("-", "_"), value)
    if current != value:
        _warn(f"{flag} {value}", current)
    return current


def _warn(old: str, new: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is deprecated and will be removed in the next release; use %s", old, new)


def for_command(command: str, content: dict[str, Any], config: type) -> dict[str, Any]:
    """What concerns `command` in a file whose tables are those of stages, as `recpress tune` writes it; others as is.

    `recpress pipeline` has such tables itself. The comparisons take the factorization's settings, and those of the
    network for frozen tables.
    """
    known = {field.name for field in fields(config)}
    staged = bool(content) and all(name in _STAGES and isinstance(part, dict) for name, part in content.items())
    if not staged or content.keys() <= known:
        return content
    if command in _STAGES:
        return dict(content.get(command, {}))
    if command == "plan":  # of a training run
        return dict(content.get("train", {}))
    found: dict[str, Any] = {}
    if "als" in known and "als" in content.get("factorize", {}):
        found["als"] = content["factorize"]["als"]
    if "frozen" in known and "train" in content:
        found["frozen"] = {name: part for name, part in content["train"].items() if name in _NETWORK}
    if "rate" in known and (rate := content.get("train", {}).get("sample", {}).get("rate")) is not None:
        found["rate"] = rate
    return found


_NETWORK = ("epochs", "optimizer", "model", "stream", "negatives")


def read(path: str) -> dict[str, Any]:
    """The content of a TOML file, with the current names of its options.

    Raises InputError naming the file if it cannot be read.
    """
    try:
        content = tomllib.loads(
            Path(path).read_text(encoding="utf-8-sig")
        )  # editors of Windows write a mark at the start
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    return current_names(content, path, warn=True)


def arguments(
    path: str, config: type, command_line: Sequence[str], command: str = "", content: dict[str, Any] | None = None
) -> list[str]:
    """`command_line` with the keys of the TOML file before it that it does not set itself.

    Args:
        command: takes its part of a file that has a table for each stage (`for_command`).
        content: of the file; by default it is read.

    Deprecated names are accepted (`RENAMED`).

    Raises InputError naming the file, the key, and the nearest known key or the expected type.
    """
    content = read(path) if content is None else content
    given = {argument.split("=")[0].replace("_", "-") for argument in command_line if argument.startswith("--")}
    from_file: list[str] = []
    for key, value in _flatten(path, config, for_command(command, content, config), ""):
        flag = "--" + key.replace("_", "-")
        head, _, leaf = flag[2:].rpartition(".")
        negated = f"--{head}.no-{leaf}" if head else f"--no-{leaf}"
        if flag in given or negated in given:
            continue
        if isinstance(value, bool):
            from_file.append(flag if value else negated)
        elif isinstance(value, list):
            from_file += [flag, *map(str, value)]
        else:
            from_file += [flag, str(value)]
    return from_file + list(command_line)


def named_tables(path: str, content: Any, kind: type[Section], prefix: str) -> dict[str, Section]:
    """The tables `[prefix.NAME]` of a file, by NAME, each as a `kind`: options that no command line can set.

    Raises InputError naming the file, the key, and the nearest known key or the expected type.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: '{prefix}' is {content!r}, expected tables [{prefix}.NAME]")
    return {name: _table(path, values, kind, f"{prefix}.{name}") for name, values in content.items()}


def _table(path: str, values: Any, kind: type[Section], prefix: str) -> Section:
    if not isinstance(values, dict):
        raise InputError(f"{path}: '{prefix}' is {values!r}, expected a table")
    for _ in _flatten(path, kind, values, f"{prefix}."):  # checks names and types
        pass
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            section = _section(hints[name])
            assert section is not None
            found[name] = _table(path, value, section, f"{prefix}.{key}")
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    for part in fields(kind):  # type: ignore[arg-type]
        if part.default is MISSING and part.default_factory is MISSING and part.name not in found:
            raise InputError(f"{path}: '{prefix}' has no '{part.name}', which it needs")
    return kind(**found)


def option_names(config: type, prefix: str = "") -> Iterator[str]:
    """Names of all options of a configuration, such as `stream.interleave`."""
    for name, kind in typing.get_type_hints(config).items():
        section = _section(kind)
        if section is None:
            yield prefix + name
        else:
            yield from option_names(section, f"{prefix}{name}.")


def _section(kind: Any) -> type | None:
    """The dataclass of an option that is a section; else None."""
    return next((t for t in _alternatives(kind) if isinstance(t, type) and is_dataclass(t)), None)


def _flatten(path: str, config: type, content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config)
    known = {field.name: hints[field.name] for field in fields(config)}
    for raw, value in content.items():
        name = raw.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"{path}: unknown key '{prefix}{raw}', nearest is '{prefix}{near[0]}'")
        if name == "factory":
            raise InputError(
                f"{path}: '{prefix}{raw}': a module is imported only if the command line names it: --{prefix}{raw}"
            )
        expected = known[name]
        section = _section(expected)
        if section is not None and isinstance(value, dict):
            yield from _flatten(path, section, value, f"{prefix}{name}.")
        elif not _fits(value, expected):
            raise InputError(f"{path}: '{prefix}{raw}' is {value!r}, expected {_describe(expected)}")
        else:
            yield prefix + name, value


def _alternatives(expected: Any) -> tuple[Any, ...]:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return typing.get_args(expected)
    return (expected,)


def _fits(value: Any, expected: Any) -> bool:
    for kind in _alternatives(expected):
        origin = typing.get_origin(kind)
        if origin is typing.Literal:
            fits = value in typing.get_args(kind)
        elif origin is tuple:
            fits = isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
        elif kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(kind, type) and isinstance(value, kind)
        if fits:
            return True
    return False


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(expected)))
    if typing.get_origin(expected) is tuple:
        return f"a list of {_describe(typing.get_args(expected)[0]).removeprefix('one of ')}"
    if is_dataclass(expected):
        return "a table"
    kinds = [kind for kind in _alternatives(expected) if kind is not type(None)]
    if kinds != [expected]:
        return " or ".join(map(_describe, kinds))
    return str(getattr(expected, "__name__", expected))
