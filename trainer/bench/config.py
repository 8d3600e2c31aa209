"""`recpress bench`: its options and the list of benchmarks. Imports neither torch nor the benchmarks.

A benchmark is a file of `recpress.benchmarks` that can be run. The first line of its docstring is its question, the
paragraph that begins with "Takes " says how long its sizes take. It accepts `--out FILE`. Constants, which are read
without running the file, define how `recpress bench run` calls it:

- `SMALL`, `FULL`: its arguments with `--size small` (half a minute or less) and `--size full`;
- `NEEDS`: a requirement that a machine may not meet; `recpress bench run all` skips the benchmark;
- `RANKS`: True if it runs on the processes of torchrun; others run on one process.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from recpress.data.errors import InputError

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One file of recpress.benchmarks."""

    name: str
    path: Path
    summary: str
    takes: str = ""
    """How long, as its docstring says."""
    small: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    needs: str = ""
    ranks: bool = False


def benchmarks(folder: Path | None = None) -> dict[str, Benchmark]:
    """By name, those of recpress.benchmarks, or of `folder`. Raises InputError if there are none."""
    if folder is None:
        found = importlib.util.find_spec("recpress.benchmarks")
        if found is None or not found.submodule_search_locations:
            raise InputError("recpress.benchmarks is not installed; expected an installed recpress: scripts/install.sh")
        folder = Path(next(iter(found.submodule_search_locations)))
    read = (_read(path) for path in sorted(folder.glob("*.py")))
    return {benchmark.name: benchmark for benchmark in read if benchmark is not None}


def chosen(names: tuple[str, ...]) -> list[Benchmark]:
    """The benchmarks with these names, in this order; `all`: those without special requirements. Raises InputError."""
    known = benchmarks()
    if not names:
        raise InputError(f"expected names of benchmarks, or '{ALL}': {', '.join(known)}")
    for name in names:
        if name not in known and name != ALL:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f", nearest is '{near[0]}'" if near else ""
            raise InputError(f"unknown benchmark '{name}'{hint}; expected '{ALL}' or some of: {', '.join(known)}")
    if ALL in names:
        return [benchmark for benchmark in known.values() if not benchmark.needs]
    return [known[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True, kw_only=True)
class BenchListConfig:
    """List the benchmarks: the question of each, and how long it takes."""


@dataclass(frozen=True, kw_only=True)
class BenchRunConfig:
    """Run benchmarks, each in its own process, and draw their results."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME ...")]
    """Names of `recpress bench list`; `all`: those without special requirements."""
    out: str = "runs/bench"
    """Folder of the results (NAME.json) and of report.html, which shows all results of the folder."""
    size: Literal["small", "full"] = "small"
    """`small`: seconds each, to check that everything works; `full`: for figures, minutes each (see `recpress bench
    list`)."""
    args: tyro.conf.Suppress[tuple[str, ...]] = ()
    """After `--`: arguments for the benchmarks themselves."""

    def __post_init__(self) -> None:
        chosen(self.names)


@dataclass(frozen=True, kw_only=True)
class BenchPageConfig:
    """Draw a page of results of `recpress bench run`, from one machine or several."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the results, *.json."""
    out: str | None = None
    """The page. Default: FOLDER/report.html."""


def _read(path: Path) -> Benchmark | None:
    """None for a file that is no benchmark."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise InputError(f"{path}: not Python: line {error.lineno}: {error.msg}") from None
    if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
        return None
    constants: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("SMALL", "FULL", "NEEDS", "RANKS"):
                constants[name.lower()] = ast.literal_eval(node.value)
    paragraphs = [part.replace("\n", " ") for part in (ast.get_docstring(tree) or path.stem).split("\n\n")]
    takes = next((part for part in paragraphs if part.startswith("Takes ")), "")
    return Benchmark(name=path.stem, path=path, summary=paragraphs[0].rstrip("."), takes=takes, **constants)
