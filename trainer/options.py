"""Options of a command: parsed by tyro, with errors of one line, a short and a full help, and shell completion."""

from __future__ import annotations

import difflib
import functools
import io
import operator
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Annotated, Any, NamedTuple, TypeVar

from recpress.data.errors import InputError
from recpress.trainer.config_file import RENAMED, option_names

FULL_HELP = "--help-all"
SHELLS = ("bash", "zsh", "fish")

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], *, prog: str, summary: str, main: Sequence[str]) -> Config:
    """The configuration that the arguments describe.

    Args:
        main: names of the options that `--help` lists; if empty, the options that are in no section.

    Raises:
        InputError: an argument is unknown, missing or invalid.
        SystemExit: the arguments ask for help, which was printed.
    """
    import tyro

    full = FULL_HELP in arguments
    arguments = ["--help" if argument == FULL_HELP else argument for argument in arguments]
    out, err = _captured(), _captured()
    try:
        with redirect_stderr(err), nullcontext() if full else _one_column_to(out):
            return tyro.cli(config, prog=prog, description=_description(summary), args=arguments)
    except SystemExit as stop:
        if stop.code not in (0, None):
            said = _one_line(_text_of(err), prog).removeprefix(f"Error parsing {config.__name__}: ")
            if "Unrecognized options:" in said and "; nearest:" not in said:
                said = said.replace(" (see ", f"{_nearest(config, said)} (see ")
            raise InputError(said) from None
        sys.stdout.write(_short_help(_text_of(out), prog, main))
        raise


def _nearest(config: type, said: str) -> str:
    """The option closest to the first unrecognized one, also by the old name of a renamed option."""
    typed = re.search(r"--([\w.-]+)", said.partition("Unrecognized options:")[2])
    names: dict[str, str] = {}  # name, also an old one -> current name
    for name in option_names(config):
        names[name] = name
        for old, new in RENAMED.items():
            if name == new or ("." in old and name.endswith(f".{new}")):
                names[name.removesuffix(new) + old] = name
    near = difflib.get_close_matches(typed[1].replace("-", "_"), names, n=1) if typed else []
    return f"; nearest: --{names[near[0]].replace('_', '-')}" if near else ""


def completion(commands: Mapping[str, tuple[type, str]], shell: str, prog: str) -> str:
    """A script that completes commands and options in a shell of `SHELLS`.

    Args:
        commands: command, of one or two words -> its configuration and a summary.
    """
    import tyro

    groups: dict[str, dict[str, Any]] = {}
    for name, (config, summary) in commands.items():
        group, _, word = name.partition(" ")
        subcommand = tyro.conf.subcommand(word or group, description=summary, prefix_name=False)
        groups.setdefault(group, {})[word] = Annotated[config, subcommand]
    tops = [
        members[""] if "" in members else Annotated[_union(members.values()), tyro.conf.subcommand(name)]
        for name, members in groups.items()
    ]
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            tyro.cli(_union(tops), prog=prog, args=["--tyro-write-completion", shell, "-"])
    except SystemExit:
        # bash would complete the further lines of a description, so the specification, one line, gets no line breaks
        return re.sub(r"^COMPLETION_SPEC = .*$", lambda spec: spec[0].replace("\\n", " "), out.getvalue(), flags=re.M)
    raise AssertionError("tyro printed no completion script")


def _union(types: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, types)


def _description(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}. A TOML file can set any option: --config FILE.toml."


def _captured() -> io.TextIOWrapper:
    """A stream whose encoding has the characters of tyro's boxes."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def _text_of(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@contextmanager
def _one_column_to(stream: io.TextIOWrapper) -> Iterator[None]:
    """Let tyro write its boxes to a stream, below each other, as the functions below read them."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(stream):
            yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


class _Section(NamedTuple):
    """One box of tyro's help."""

    prefix: str
    """Of its options: `stream.`; empty for those in no section."""
    summary: str
    options: dict[str, list[str]]
    """Name without dashes -> its lines."""


def _short_help(text: str, prog: str, main: Sequence[str]) -> str:
    """tyro's help with the main options alone, and a list of the other sections."""
    head, sections = _sections(text)
    options = {name: lines for section in sections for name, lines in section.options.items()}
    top = [name for section in sections if not section.prefix for name in section.options]
    names = [name for name in main if name in options] or top
    names.sort(key=lambda name: not any("(required)" in line for line in options[name]))
    shown = [line for name in names for line in _reflowed(options[name])]
    rest = [
        f"  {f'--{section.prefix}*':{_WIDTH}}{len(section.options):3}  {section.summary}".rstrip()
        for section in sections
        if section.prefix and not section.options.keys() <= set(names)
    ]
    others = sum(1 for name in top if name not in names)
    if others:
        rest.insert(0, f"  {'--*':{_WIDTH}}{others:3}  further options in no section")
    if not rest:
        return "\n".join([*head, *(["options:", *shown, ""] if shown else [])])
    more = f"more options, which `{prog} {FULL_HELP}` describes:"
    return "\n".join([*head, "main options:", *shown, "", more, *rest, ""])


_WIDTH = 28


def _reflowed(lines: list[str]) -> list[str]:
    """An option and its help, without the line breaks of the source."""
    names = [line for line in lines if not line.startswith(_HELP_INDENT)]
    names[-1], *begin = re.split(r"(?<=\S) {2,}", names[-1], maxsplit=1)  # its help may begin on the same line
    words = " ".join([*begin, *(line.strip() for line in lines[len(names) :])])
    return [*names, *_wrap(words)]


_HELP_INDENT = " " * 8
_wrap = textwrap.TextWrapper(
    width=100, initial_indent=_HELP_INDENT, subsequent_indent=_HELP_INDENT, break_on_hyphens=False
).wrap


def _sections(text: str) -> tuple[list[str], list[_Section]]:
    """What stands before the boxes of tyro's help, and the boxes."""
    head: list[str] = []
    sections: list[_Section] = []
    summary: list[str] = []
    current: list[str] = []
    name = ""
    for line in text.splitlines():
        if title := re.match(r"╭─ (?:(.*?)options|positional arguments) ─", line):
            prefix = (title[1] or "").strip()
            sections.append(_Section(f"{prefix}." if prefix else "", "", {}))
            summary, current = [], []
            name = r" --([^\s,=]+)" if title[1] is not None else r" ([A-Z]+) "
        elif not sections:
            head.append(line)
        elif line.startswith("│"):
            inner = line[1:-1].rstrip()
            section = sections[-1]
            if option := re.match(name, inner):
                current = section.options.setdefault(option[1], [])
            if inner.startswith(" ──"):
                first = re.split(r"(?<=[.:;]) ", " ".join(" ".join(summary).split()))[0]
                sections[-1] = section._replace(summary=first.rstrip(".:;"))
            elif section.options:
                current.append(f" {inner}")
            else:
                summary.append(inner)
    return head, sections


def _one_line(text: str, prog: str) -> str:
    """tyro's box about an error as one line, without the help of the options that it names."""
    rows = [line.strip("│╭╰╮╯─ \n") and line[1:-1].rstrip() for line in text.splitlines() if line.startswith("│")]
    parts: list[list[str]] = []
    part: list[str] = []
    for row in [*rows, ""]:
        if not row:  # a rule between two parts
            parts.append(part)
            part = []
        elif not row.startswith("         "):  # help of an option
            part.append(row)
    lines = []
    for part in parts:
        if not part or part[0].strip().startswith(("For full helptext", "Argument helptext")):
            continue
        items = [row.strip() for row in part if row.startswith("     ")]
        lines.append(" ".join([" ".join(row.strip() for row in part if not row.startswith("     ")), ", ".join(items)]))
    said = "; ".join(" ".join(line.split()) for line in lines).replace("; Perhaps you meant:", "; nearest:")
    return f"{said or ' '.join(text.split())} (see {prog} --help)"
