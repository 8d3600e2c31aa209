"""`recpress bench`: which benchmarks there are, and its options. Free of torch, and of the benchmarks themselves.

A benchmark is a file of `recpress.benchmarks` that can be run. The first line of its docstring says what it asks, the
paragraph that begins with "Takes " how long its sizes take; it takes `--out FILE`, and says with constants, which are
read without running it, how `recpress bench run` calls it:

- `SMALL`, `FULL`: its arguments with `--size small` (half a minute or less) and `--size full`;
- `NEEDS`: what it takes that a machine may not have; `recpress bench run all` leaves it out;
- `RANKS`: True where it runs on the processes that torchrun started; others run on one.
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
    """How long, in its own words."""
    small: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    needs: str = ""
    ranks: bool = False


def benchmarks(folder: Path | None = None) -> dict[str, Benchmark]:
    """By name, those of recpress.benchmarks, or of `folder`. Raises InputError where there are none."""
    if folder is None:
        found = importlib.util.find_spec("recpress.benchmarks")
        if found is None or not found.submodule_search_locations:
            raise InputError("recpress.benchmarks is not installed; expected an installed recpress: scripts/install.sh")
        folder = Path(next(iter(found.submodule_search_locations)))
    read = (_read(path) for path in sorted(folder.glob("*.py")))
    return {benchmark.name: benchmark for benchmark in read if benchmark is not None}


def chosen(names: tuple[str, ...]) -> list[Benchmark]:
    """The benchmarks of these names, in this order; `all` are those that need nothing special. Raises InputError."""
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
    """List the benchmarks: what each asks, and how long it takes."""


@dataclass(frozen=True, kw_only=True)
class BenchRunConfig:
    """Run benchmarks, each in a process of its own, and draw their results."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME ...")]
    """Names of `recpress bench list`; `all`: those that need nothing special."""
    out: str = "runs/bench"
    """Folder of the results, NAME.json each, and of report.html, which shows all that are in it."""
    size: Literal["small", "full"] = "small"
    """`small`: seconds each, to see that everything works; `full`: for figures, minutes each (`recpress bench list`
    says how many)."""
    args: tyro.conf.Suppress[tuple[str, ...]] = ()
    """What stands after `--`: arguments for the benchmarks themselves."""

    def __post_init__(self) -> None:
        chosen(self.names)


@dataclass(frozen=True, kw_only=True)
class BenchPageConfig:
    """Draw a page of results that `recpress bench run` wrote, on one machine or on several."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the results, *.json."""
    out: str | None = None
    """The page; FOLDER/report.html where nothing is said."""


def _read(path: Path) -> Benchmark | None:
    """None: a file that cannot be run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise InputError(f"{path}: not Python: line {error.lineno}: {error.msg}") from None
    if not any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
        return None
    said: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("SMALL", "FULL", "NEEDS", "RANKS"):
                said[name.lower()] = ast.literal_eval(node.value)
    paragraphs = [part.replace("\n", " ") for part in (ast.get_docstring(tree) or path.stem).split("\n\n")]
    takes = next((part for part in paragraphs if part.startswith("Takes ")), "")
    return Benchmark(name=path.stem, path=path, summary=paragraphs[0].rstrip("."), takes=takes, **said)
