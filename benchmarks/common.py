"""Shared by all benchmarks: their results as a table on the terminal and as one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from recpress.data.dataset.atomic import replacing

FORMAT = 1
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "pyarrow")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the docstring of a benchmark as its help, and `--out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file of the result")
    return parser


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine's size, the device's name, and the versions that decide speed; no host names, no paths."""
    device = torch.device(device)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "versions": versions,
    }


def publish(
    question: str,
    rows: Sequence[dict[str, Any]],
    *,
    out: str | Path | None,
    settings: dict[str, Any],
    device: torch.device | str = "cpu",
    plots: Sequence[dict[str, Any]] = (),
) -> None:
    """Print `rows` as a table and, with `out`, write them to a JSON file for `recpress bench` and the report page.

    Args:
        question: one line; the title of table and plots.
        rows: one dict per case, keys with units ("rows/s", "peak MB"); all may have the same keys.
        settings: the arguments that made them, JSON values.
        plots: for the page, from `lines` and `bars`. Default: bars of one measure.
    """
    print(f"\n{question}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [[row.get(column, "") for column in columns] for row in rows]
    print(_drawn(columns, table), flush=True)
    if out is not None:
        write(question, rows, out=out, settings=settings, device=device, plots=plots)


def write(
    question: str,
    rows: Sequence[dict[str, Any]],
    *,
    out: str | Path,
    settings: dict[str, Any],
    device: torch.device | str = "cpu",
    plots: Sequence[dict[str, Any]] = (),
) -> None:
    """The JSON file of `publish`."""
    result = {
        "format": FORMAT,
        "benchmark": Path(sys.argv[0]).stem,
        "question": question,
        "settings": settings,
        "machine": machine(device),
        "seconds": _seconds_since_start(),
        "rows": list(rows),
        "plots": list(plots),
    }
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def lines(
    x: Sequence[str],
    y: Sequence[str],
    by: Sequence[str],
    *,
    title: str,
    at: dict[str, Any] | None = None,
    only: dict[str, list[Any]] | None = None,
) -> dict[str, Any]:
    """A plot of each column of `y` against each column of `x`, a line for each value of the columns `by`.

    Args:
        at: if several columns are varied one at a time: the value of each while another is varied.
        only: column -> the values of the rows that are drawn.
    """
    return {"kind": "lines", "x": [*x], "y": [*y], "by": [*by], "title": title, "at": at or {}, "only": only or {}}


def bars(
    y: Sequence[str], by: Sequence[str], *, title: str, only: dict[str, list[Any]] | None = None
) -> dict[str, Any]:
    """A bar for each row, named by the columns `by`, side by side for each column of `y`."""
    return {"kind": "bars", "y": [*y], "by": [*by], "title": title, "only": only or {}}


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return find_spec(package) is not None


MISSING = "not installed: scripts/install.sh .venv bench"
"""Note in the row of a peer that is not installed."""


def settings_of(values: dict[str, Any], leave_out: Iterable[str] = ("out",)) -> dict[str, Any]:
    """The arguments of a benchmark as JSON values, without paths of this machine."""
    known = (bool, int, float, str, list, tuple, type(None))
    return {
        name: value if isinstance(value, known) else str(value)
        for name, value in values.items()
        if name not in leave_out
    }


def _drawn(columns: Sequence[str], table: Sequence[Sequence[Any]]) -> str:
    try:
        from tabulate import tabulate  # type: ignore[import-untyped]
    except ImportError:  # a GPU machine where nothing can be installed

        def shown(cell: Any) -> str:
            return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

        cells = [[shown(cell) for cell in line] for line in table]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        lines = [columns, ["-" * width for width in widths], *cells]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return tabulate(table, headers=columns, floatfmt=".4g", intfmt=",")


def _seconds_since_start() -> float | None:
    """Of this process; None if the system does not provide it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 1)
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
