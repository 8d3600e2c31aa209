"""Hooks of mkdocs.yml: pages that are generated from code or live elsewhere in the repository.

- `reference/cli/*.md`: one page per command, from the same dataclasses as the command line itself.
- `benchmarks.md`, `contributing.md` and others: files of the repository outside of docs/ (`ELSEWHERE`).
- A screenshot of the report page, if `make demo` has written one and Chromium is installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from posixpath import relpath
from typing import Any

import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from recpress.trainer.cli import COMMANDS, Command

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""File of the repository -> page of the site."""
REPORT = ROOT / "runs" / "demo" / "report.html"
CLI = "reference/cli"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append a page per command to the navigation."""
    reference = next(section["Reference"] for section in config.nav or [] if "Reference" in section)
    at = next(i for i, entry in enumerate(reference) if "Command line" in entry)
    index = reference[at].pop("Command line")
    if isinstance(index, list):  # `mkdocs serve` keeps the configuration between builds
        index = index[0]
    reference[at]["Command line"] = [index, *({f"recpress {name}": page_of(name)} for name in COMMANDS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {f"{CLI}/index.md": command_list(), **{page_of(name): command_page(name) for name in COMMANDS}}
    for source, page in ELSEWHERE.items():
        if page != "index.md":
            pages[page] = (ROOT / source).read_text()
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    if picture := screenshot():
        files.append(File.generated(config, "img/report.png", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links between repository files, so that they work on the site and in the repository alike."""
    uri = page.file.src_uri
    source = next((path for path, target in ELSEWHERE.items() if target == uri and uri != "index.md"), f"docs/{uri}")

    def resolve(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        if target in ELSEWHERE:
            target = ELSEWHERE[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return match[0]
        return f"]({relpath(target, os.path.dirname(uri) or '.')}{match[2] or ''})"

    markdown = LINK.sub(resolve, markdown)
    shown = files.get_file_from_path("img/report.png")
    picture = f"![Report page of the demo]({relpath('img/report.png', os.path.dirname(uri) or '.')})"
    return markdown.replace("<!-- report screenshot -->", picture if shown else "")


# ---- the command line


def page_of(name: str) -> str:
    return f"{CLI}/{name.replace(' ', '-')}.md"


def command_list() -> str:
    rows = [f"| [`recpress {n}`]({n.replace(' ', '-')}.md) | {sentence(c.summary)} |" for n, c in COMMANDS.items()]
    return "\n".join(
        [
            "# Command line",
            "",
            "Generated from the code. `recpress COMMAND --help` prints the main options, `--help-all` all of them.",
            "",
            "| command | |",
            "|---|---|",
            *rows,
            "",
            "- `--config FILE.toml` sets any option from a file. The command line overrides the file.",
            "- `--log-format json` (or `RECPRESS_LOG_FORMAT=json`) writes log lines to stderr as JSON.",
            "- `recpress check COMMAND ...` validates the arguments and does nothing else.",
            "- `recpress completion SHELL` prints a completion script for bash, zsh or fish.",
            "- `recpress --version` prints the versions of recpress, torch, torchrec and fbgemm.",
            "- `RECPRESS_DEBUG=1` prints the traceback of an error.",
            "",
        ]
    )


def command_page(name: str) -> str:
    command = COMMANDS[name]
    lines = [f"# recpress {name}", "", sentence(command.summary), ""]
    for group in parser_of(command)._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        title = (group.title or "options").removesuffix(" options")
        lines += [f"## {title}", ""] + ([cell(group.description), ""] if group.description else [])
        lines += ["| option | values | meaning |", "|---|---|---|", *map(option_row, required_first(actions)), ""]
    return "\n".join(lines)


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser that `tyro.cli` makes for this command."""
    module, _, attribute = command.config.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(getattr(importlib.import_module(module), attribute))


def required_first(actions: list[argparse.Action]) -> list[argparse.Action]:
    return sorted(actions, key=lambda action: not action.required)


def option_row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
    metavar = str(action.metavar or "")
    words = re.split(r"[{},|]+", metavar) if "{" in metavar else [metavar.replace("|", " or ")]
    values = ", ".join(f"`{word.strip()}`" for word in words if word.strip(" []."))
    return f"| {names} | {values} | {cell(action.help or '')} |"


def cell(text: str) -> str:
    """Help text for a table cell, with its mentions of pages as links."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace(" (default: )", "")
    text = re.sub(r"(?<![`\w-])--[a-z][\w.-]*\w", r"`\g<0>`", text)
    return re.sub(r"docs/([\w/-]+\.md)", lambda found: f"[{found[1]}](../../{found[1]})", text)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# ---- the report


def screenshot() -> bytes | None:
    """The demo's report page as PNG. Not committed, since it is a binary that changes with every run."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None or not REPORT.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400"]
        command: list[Any] = [browser, *flags, f"--user-data-dir={folder}", f"--screenshot={target}", REPORT.as_uri()]
        subprocess.run(command, check=False, capture_output=True, timeout=120)
        return target.read_bytes() if target.exists() else None
