"""The report page of `recpress bench`: results of benchmarks as charts and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recpress.data.errors import InputError
from recpress.trainer.report.charts import Bars, Chart, Lines, Series
from recpress.trainer.report.page import Report, Section, Table

FORMAT = 1
_MEASURES = ("/s", "ratio", "seconds", "seconds to quality", "MB", " s", "ms", "bytes")
"""Endings of columns that are drawn if a benchmark defines no charts, the most important first."""
_MAX_BARS = 40
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one benchmark, as `benchmarks/common.py` writes it."""

    benchmark: str
    question: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]
    plots: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    """That the benchmark took, with its start."""

    @property
    def columns(self) -> list[str]:
        """Of all rows, in the order of their appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def read_results(folder: str | Path) -> list[Result]:
    """The results in a folder, by name. Raises InputError if there are none, or naming a file that is not one."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no results, expected NAME.json of `recpress bench run`")
    return [_read(path) for path in paths]


def write_page(path: str | Path, results: Sequence[Result]) -> None:
    """Write the page as one HTML file. Raises InputError if it cannot be written."""
    machines = list(dict.fromkeys(_machine(result) for result in results))
    sections = []
    for result in results:
        took = "" if result.seconds is None else f", which took {result.seconds:,.0f} s"
        section = Section(
            title=result.question,
            charts=list(_charts(result)),
            table=_table(result),
            facts=[("Machine", _machine(result))] if len(machines) > 1 else [],
            details=(f"Settings of {result.benchmark}{took}", json.dumps(result.settings, indent=1)),
        )
        sections.append(section)
    names = ["Machine"] if len(machines) == 1 else [f"Machine {number}" for number in range(1, len(machines) + 1)]
    sections.append(Section(title="Where it ran", facts=list(zip(names, machines, strict=True))))
    Report(
        title="Memory and speed, measured",
        tiles=[(str(len(results)), "benchmarks"), *_size(results[0])],
        summary=[
            "Each section is one question, with the peer measured in the same run. Times on a shared machine are noisy "
            "by tens of percent; ratios of runs that took turns say more."
        ],
        sections=sections,
    ).write(path)


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise InputError(f"{path}: format {found['format']}, expected {FORMAT}")
        names = ("benchmark", "question", "settings", "machine", "rows")
        return Result(
            **{name: found[name] for name in names}, plots=found.get("plots", []), seconds=found.get("seconds")
        )
    except KeyError as error:
        raise InputError(f"{path}: not a result of `recpress bench run`: it has no {error}") from None
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a result of `recpress bench run`: {error}") from None


def _size(result: Result) -> list[tuple[str, str]]:
    machine = result.machine
    tiles = [(f"{machine['cores']}", "cores"), (f"{machine['memory_gib']:g} GiB", "memory")]
    return tiles if machine["device"] == "CPU" else [*tiles, (machine["device"], "device")]


def _machine(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    device = "" if machine["device"] == "CPU" else f"{machine['device']}, "
    return (
        f"{device}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; "
        f"Python {machine['python']}, {versions}"
    )


def _table(result: Result) -> Table:
    columns = result.columns
    return Table(header=columns, rows=[[shown(row.get(column)) for column in columns] for row in result.rows])


def shown(value: Any) -> str:
    """A value of a table: four digits, thousands separated."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _short(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _charts(result: Result) -> Iterator[Chart]:
    for plot in result.plots or [_guess(result)]:
        only = plot.get("only", {})
        rows = [row for row in result.rows if all(row.get(key) in values for key, values in only.items())]
        if plot["kind"] == "bars":
            yield from _bars(rows, plot)
            continue
        for x in plot["x"]:
            fixed = {key: value for key, value in plot["at"].items() if key != x}
            yield from _lines([row for row in rows if all(row.get(k) == v for k, v in fixed.items())], x, plot, fixed)


def _guess(result: Result) -> dict[str, Any]:
    """Bars of the column that is most likely a measure, labeled by the text columns."""
    numbers = [c for c in result.columns if any(_is_number(row.get(c)) for row in result.rows)]
    measures = [c for ending in _MEASURES for c in numbers if c.endswith(ending)] or numbers[-1:]
    words = [c for c in result.columns if any(isinstance(row.get(c), str) for row in result.rows)]
    words = [c for c in words if c != "note"] or [c for c in result.columns if c not in measures[:1]][:1]
    return {"kind": "bars", "y": measures[:1], "by": words, "title": ""}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _label(row: Row, columns: Sequence[str]) -> str:
    known = ((column, row[column]) for column in columns if row.get(column) not in (None, ""))
    return ", ".join(f"{column} {shown(value)}" if _is_number(value) else shown(value) for column, value in known)


def _bars(rows: list[Row], plot: dict[str, Any]) -> Iterator[Chart]:
    measures = [y for y in plot["y"] if any(_is_number(row.get(y)) for row in rows)]
    rows = [row for row in rows if any(_is_number(row.get(y)) for y in measures)]
    if not measures or not 0 < len(rows) <= _MAX_BARS:
        return
    panels = [
        Bars(
            x_label=measure,
            labels=[_label(row, plot["by"]) for row in rows],
            groups=[(measure, [row[measure] if _is_number(row.get(measure)) else 0.0 for row in rows])],
            value_labels=[shown(row.get(measure)) for row in rows],
            format_x=_short,
        )
        for measure in measures
    ]
    title = plot["title"] or f"{' and '.join(measures)}, by {', '.join(plot['by'])}"
    yield Chart(title=title, caption=f"{title}.", panels=panels, size=(7.2, 0.9 + 0.27 * len(rows)), legend=False)


def _lines(rows: list[Row], x: str, plot: dict[str, Any], fixed: dict[str, Any]) -> Iterator[Chart]:
    rows = [row for row in rows if _is_number(row.get(x))]
    measures = [y for y in plot["y"] if any(_is_number(row.get(y)) for row in rows)]
    ticks = sorted({row[x] for row in rows})
    if not measures or len(ticks) < 2:
        return
    panels = [
        Lines(
            x_label=x,
            y_label=measure,
            series=_series(rows, x, measure, plot["by"]),
            log_x=ticks[0] > 0 and ticks[-1] / ticks[0] > 5,
            x_ticks=ticks,
            format_x=lambda tick: shown(tick) if tick < 1e5 else _short(tick),
            format_y=_short,
            y_from_zero=measure.endswith(_MEASURES),  # an amount; of a quality the differences count
        )
        for measure in measures
    ]
    at = ", ".join(f"{key} {shown(value)}" for key, value in fixed.items())
    caption = f"{plot['title']}: {' and '.join(measures)} against {x}" + (f"; {at}" if at else "") + "."
    yield Chart(title=caption, caption=caption, panels=panels, size=(3.6 * max(2, len(measures)), 3.1))


def _series(rows: list[Row], x: str, measure: str, by: Sequence[str]) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {_label(row, by): [] for row in rows}
    for row in sorted(rows, key=lambda row: row[x]):
        if _is_number(row.get(measure)):
            points[_label(row, by)].append((row[x], row[measure]))
    return [
        Series(label=label, x=[at for at, _ in found], y=[y for _, y in found], color=color, size=4.5)
        for color, (label, found) in enumerate(points.items(), 1)
        if found
    ]
