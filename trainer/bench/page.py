"""The page of `recpress bench`: what benchmarks found, as plots and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from recpress.data.errors import InputError
from recpress.trainer.report.page import (
    PLOT_STYLE,
    SERIES,
    Cell,
    Code,
    Facts,
    Paragraph,
    Plot,
    Section,
    Table,
    Tiles,
    plot_svg,
    write_report,
)

FORMAT = 1
_MARKERS = "osD^vP<>X*"
_MEASURES = ("/s", "ratio", "seconds", "seconds to quality", "MB", " s", "ms", "bytes")
"""Endings of columns that are worth a bar where a benchmark says nothing of plots, the first ones first."""
_MOST_BARS = 40
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one benchmark found, as `benchmarks/common.py` writes it."""

    benchmark: str
    question: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]
    plots: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    """That the benchmark took, start and end included."""

    @property
    def columns(self) -> list[str]:
        """Of all rows, in the order of their appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def read_results(folder: str | Path) -> list[Result]:
    """The results in a folder, by name. Raises InputError where there are none, naming a file that is none."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no results, expected NAME.json of `recpress bench run`")
    return [_read(path) for path in paths]


def write_page(path: str | Path, results: Sequence[Result]) -> None:
    """Write the page as one HTML file. Raises InputError where it cannot be written."""
    machines = list(dict.fromkeys(_machine(result) for result in results))
    head: list[Any] = [
        Tiles([(str(len(results)), "benchmarks"), *_size(results[0])]),
        Paragraph(
            "Each section is one question, with the peer measured in the same run. Times of a machine that others use "
            "too are noise of tens of per cent; ratios, which are of runs that took turns, say more."
        ),
    ]
    sections = [Section("", head)]
    for result in results:
        blocks: list[Any] = [*_plots(result), _table(result)]
        if len(machines) > 1:
            blocks.append(Facts([("Machine", _machine(result))]))
        blocks.append(Code(json.dumps(result.settings, indent=1), _settings(result)))
        sections.append(Section(result.question, blocks))
    facts = [("Machine" if len(machines) == 1 else f"Machine {place}", name) for place, name in enumerate(machines, 1)]
    sections.append(Section("Where it ran", [Facts(facts)]))
    write_report(path, "Memory and speed, measured", sections)


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise InputError(f"{path}: format {found['format']}, expected {FORMAT}")
        names = ("benchmark", "question", "settings", "machine", "rows")
        return Result(
            **{name: found[name] for name in names}, plots=found.get("plots", []), seconds=found.get("seconds")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: not a result of `recpress bench run`: {reason}") from None


def _settings(result: Result) -> str:
    took = "" if result.seconds is None else f", which took {result.seconds:,.0f} s"
    return f"Settings of {result.benchmark}{took}"


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
    return Table(header=columns, rows=[[Cell(shown(row.get(column))) for column in columns] for row in result.rows])


def shown(value: Any) -> str:
    """A value of a table: four digits, thousands apart."""
    if value is None or value == "":
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"  # noqa: RUF001
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _plots(result: Result) -> Iterator[Plot]:
    wanted = result.plots or [_guess(result)]
    for number, plot in enumerate(wanted):
        rows = [
            row for row in result.rows if all(row.get(key) in values for key, values in plot.get("only", {}).items())
        ]
        name = f"{result.benchmark}-{number}"
        if plot["kind"] == "bars":
            yield from _bars(rows, plot, name)
        else:
            for x in plot["x"]:
                at = {key: value for key, value in plot["at"].items() if key != x}
                here = [row for row in rows if all(row.get(key) == value for key, value in at.items())]
                yield from _lines(here, x, plot, f"{name}-{plot['x'].index(x)}")


def _guess(result: Result) -> dict[str, Any]:
    """Bars of the column that looks most like a measure, named by the columns of words."""
    numbers = [c for c in result.columns if any(_is_number(row.get(c)) for row in result.rows)]
    measures = [c for ending in _MEASURES for c in numbers if c.endswith(ending)] or numbers[-1:]
    words = [c for c in result.columns if any(isinstance(row.get(c), str) for row in result.rows)]
    words = [c for c in words if c != "note"] or [c for c in result.columns if c not in measures[:1]][:1]
    return {"kind": "bars", "y": measures[:1], "by": words, "title": ""}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(row: Row, columns: Sequence[str]) -> str:
    said = ((column, row[column]) for column in columns if row.get(column) not in (None, ""))
    return ", ".join(f"{column} {shown(value)}" if _is_number(value) else shown(value) for column, value in said)


def _bars(rows: list[Row], plot: dict[str, Any], name: str) -> Iterator[Plot]:
    measures = [y for y in plot["y"] if any(_is_number(row.get(y)) for row in rows)]
    rows = [row for row in rows if any(_is_number(row.get(y)) for y in measures)]
    if not measures or not 0 < len(rows) <= _MOST_BARS:
        return
    with rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            values = [row[measure] if _is_number(row.get(measure)) else 0.0 for row in rows]
            drawn = axes.barh(range(len(rows)), values, color=SERIES[1], height=0.66)
            labels = [shown(row.get(measure)) for row in rows]
            axes.bar_label(drawn, labels, padding=3, fontsize=8)
            axes.margins(x=0.22)
            axes.set_xlim(left=0)
            axes.set_xlabel(measure)
            axes.grid(False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(rows)), [_name(row, plot["by"]) for row in rows])
        panels[0].invert_yaxis()
        title = plot["title"] or f"{' and '.join(measures)}, by {', '.join(plot['by'])}"
        yield Plot(plot_svg(figure, name), f"{title}.", title)


def _lines(rows: list[Row], x: str, plot: dict[str, Any], name: str) -> Iterator[Plot]:
    rows = [row for row in rows if _is_number(row.get(x))]
    measures = [y for y in plot["y"] if any(_is_number(row.get(y)) for row in rows)]
    places = sorted({row[x] for row in rows})
    if not measures or len(places) < 2:
        return
    series = list(dict.fromkeys(_name(row, plot["by"]) for row in rows))
    with rc_context(PLOT_STYLE):
        figure = Figure(figsize=(3.6 * max(2, len(measures)), 3.1), layout="constrained")
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            for place, label in enumerate(series):
                points = sorted(
                    (row[x], row[measure])
                    for row in rows
                    if _name(row, plot["by"]) == label and _is_number(row.get(measure))
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=SERIES[(place + 1) % len(SERIES)],
                        marker=_MARKERS[place % len(_MARKERS)],
                        markersize=4.5,
                        label=label,
                    )
            _axis(axes, x, places)
            axes.set_ylabel(measure)
            if measure.endswith(_MEASURES):  # an amount; of a quality the differences count
                axes.set_ylim(0, 1.06 * axes.dataLim.y1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8.5, handlelength=1.6
        )
        fixed = ", ".join(f"{key} {shown(value)}" for key, value in plot["at"].items() if key != x)
        caption = f"{plot['title']}: {' and '.join(measures)} against {x}" + (f"; {fixed}" if fixed else "") + "."
        yield Plot(plot_svg(figure, name), caption, caption)


def _axis(axes: Axes, x: str, places: list[float]) -> None:
    """Marks at the measured values alone; logarithmic where they span more than a factor of five."""
    axes.set_xlabel(x)
    if places[0] > 0 and places[-1] / places[0] > 5:
        axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(places, [shown(place) if place < 1e5 else _short(place) for place in places])
    axes.minorticks_off()


def _short(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
