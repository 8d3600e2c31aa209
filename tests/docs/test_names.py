"""Names in the documents exist: options, modules, classes, files, links and their anchors."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import tyro

from recpress._moved import MOVED
from recpress.launch import components
from recpress.trainer.cli import COMMANDS
from recpress.trainer.train.config import MODELS, model_options

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OTHERS = {
    *("--config", "--help", "--help-all", "--version", "--log-format"),  # of every command
    *("--nproc-per-node", "--dryrun", "--streams", "--workspace"),  # torchrun, torchx
    *("--requeue", "--signal", "--export", "--upgrade"),  # Slurm, uv
    *("--keep", "--dcn"),  # examples
    "--train.model",  # of commands that train, which read it before the options of the model
}
"""Options that no configuration has: of the command line as such, and of other programs."""


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def inline(path: Path) -> list[str]:
    """Text between single backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def options() -> set[str]:
    """Options of all commands, of the TorchX components and of other programs."""
    found = set(OTHERS)
    places = [command.config.partition(":") for command in COMMANDS.values()]
    bases = [command.with_model.partition(":") for command in COMMANDS.values() if command.with_model]
    configs = [getattr(importlib.import_module(module), attribute) for module, _, attribute in places]
    with_model = [getattr(importlib.import_module(module), attribute) for module, _, attribute in bases]
    for config in [*configs, *(model_options(name, base) for name in MODELS for base in with_model)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(config)
        found |= {name for action in parser._actions for name in action.option_strings}
    for _, component in inspect.getmembers(components, inspect.isfunction):
        found |= {f"--{name}" for name in inspect.signature(component).parameters}
    for script in (*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")):
        found |= set(re.findall(r'"(--[a-z][\w-]*)"', script.read_text()))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_options_exist(path: Path) -> None:
    shown = {name for code in inline(path) for name in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)}
    sections = {name.split(".")[0] for name in options() if "." in name}
    missing = shown - options() - sections
    assert not missing, f"{path}: no such option: {sorted(missing)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_python_names_exist(path: Path) -> None:
    for name in set(re.findall(r"\brecpress(?:\.[a-zA-Z_]\w*)+", path.read_text())):
        if not hasattr(components, name.removeprefix("recpress.")):  # `recpress.train` is a TorchX component
            resolve(name)


def resolve(name: str) -> object:
    """Import the longest module of a dotted name and take the rest as attributes. Raises where there is none."""
    words = name.split(".")
    for split in range(len(words), 0, -1):
        if ".".join(words[:split]) in MOVED:  # a path of the last version
            continue
        try:
            found: object = importlib.import_module(".".join(words[:split]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for word in words[split:]:
            found = getattr(found, word)
        return found
    raise AssertionError(f"no module of {name}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_files_exist(path: Path) -> None:
    folders = "benchmarks|data|docs|examples|launch|modules|requirements|scripts|src|tests|trainer"
    for code in inline(path):
        for name in re.findall(rf"(?:^|\s)((?:{folders})/[\w./-]+?(?:\.\w+|/))(?=[\s:]|$)", code):
            if "NAME" not in name:
                assert (ROOT / name).exists(), f"{path}: no such file: {name}"


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as Python-Markdown and GitHub make them of plain text."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", path.read_text()):
        to = (path.parent / target).resolve() if target else path
        assert to.exists(), f"{path}: dead link: {target}"
        assert not anchor or anchor in anchors(to), f"{path}: no heading '{anchor}' in {target or path.name}"


def test_messages_exist() -> None:
    """Messages that docs/operate/errors.md explains, and words that docs/operate/monitor.md says to search for."""
    sources = [path.read_text() for folder in ("data", "modules", "trainer") for path in (ROOT / folder).rglob("*.py")]
    errors = (ROOT / "docs" / "operate" / "errors.md").read_text().partition("## Launch")[0]
    monitor = (ROOT / "docs" / "operate" / "monitor.md").read_text()
    shown = [
        code for cell in re.findall(r"^\| ([^|]+) \|", errors, flags=re.MULTILINE) for code in cell.split("`")[1::2]
    ]
    shown += re.search(r"^Search for these words: (.*)$", monitor, flags=re.MULTILINE)[1].split("`")[1::2]  # type: ignore[index]
    messages = [code.removeprefix("OUT: ").removesuffix(" ...") for code in shown if " " in code and "--" not in code]
    assert len(messages) > 5
    for message in messages:
        assert any(message in source for source in sources), f"no such message: {message}"


def test_options_of_components_exist() -> None:
    found = 0
    for path in DOCUMENTS:
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:launch/components\.py:|recpress\.)(\w+) (-.*)", line):
                options_of = inspect.signature(getattr(components, match[1])).parameters
                job = re.split(r"(?:^| )-- ", match[2])[0]
                for name in re.findall(r"(?:^| )--?(\w+)", job):
                    found += 1
                    assert name in options_of, f"{path}: component {match[1]} has no option '{name}'"
    assert found > 5
