"""The report page of a comparison: key figures, the table, plots, methods, and how to run it again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from recpress.trainer.report.page import (
    MUTED,
    PLOT_STYLE,
    SERIES,
    Alert,
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
from recpress.trainer.report.results import (
    CompareResult,
    MethodResult,
    format_bytes,
    format_metric,
    format_parts,
    format_rows,
    format_seconds,
    format_speedup,
    format_to_goal,
)

_MARKERS = "osD^vP<>hd"
_NBSP = "\u00a0"


def write_compare_report(path: str | Path, result: CompareResult) -> None:
    """Writes the page of a comparison to one HTML file. Raises InputError where it cannot be written."""
    methods = tuple(replace(m, name=m.name.replace(" %", f"{_NBSP}%")) for m in result.methods)
    write_report(path, result.title, compare_sections(replace(result, methods=methods)))


def compare_sections(result: CompareResult) -> list[Section]:
    """The page's sections; plots that the result has no points for are left out."""
    plots = [
        plot
        for plot in (_quality_against_time(result), _training_curves(result), _objective(result))
        if plot is not None
    ]
    facts = [(word, f"{value:,}" if isinstance(value, int) else str(value)) for word, value in result.data.items()]
    again: list[Code | Facts] = []
    if result.command:
        again.append(Code(result.command))
    if result.versions:
        again.append(Facts([("Versions", ", ".join(f"{n} {v}" for n, v in result.versions.items()))]))
    if result.config:
        again.append(Code(json.dumps(result.config, indent=2, default=str, ensure_ascii=False), "Configuration"))
    sections = [
        Section(
            "",
            [
                *(Alert(text) for text in result.warnings),
                Paragraph(_summary(result)),
                _tiles(result),
                *map(Paragraph, result.notes),
            ],
        ),
        Section("Results", [_table(result)]),
        *(Section(plot.alt, [plot]) for plot in plots),
        Section("Methods", [Facts([(method.name, method.description) for method in result.methods])]),
    ]
    if facts:
        sections.append(Section("Data", [Facts(facts)]))
    if again:
        sections.append(Section("How to run it again", again))
    return sections


def _summary(result: CompareResult) -> str:
    ours, metric = result.method(result.ours), result.metrics[-1]
    text = f"{ours.name}: {metric} {format_metric(ours.mean(metric), ours.spread(metric))}"
    if ours.rows is not None:
        text += f", its network trained on {ours.rows:,} of {result.total_rows:,} rows"
    text += f", in {format_seconds(ours.seconds)}"
    for key in dict.fromkeys((result.factorization, result.reference)):
        other = result.method(key)
        if key != result.ours:
            text += f". {other.name}: {format_metric(other.mean(metric), other.spread(metric))}"
            text += f" in {format_seconds(other.seconds)}"
    text += ". Times include the factorization."
    if not math.isnan(result.goal):
        reference = result.method(result.reference)
        text += f" {reference.name} takes {format_seconds(result.seconds_to_goal(reference))} to its best "
        text += f"{result.goal_metric} on {result.curve_of}, {result.goal:.4f}; "
        seconds = result.seconds_to_goal(ours)
        reached = f"reaches it in {format_seconds(seconds)}" if math.isfinite(seconds) else "does not reach it"
        text += f"{ours.name} {reached}."
    return text


def _tiles(result: CompareResult) -> Tiles:
    ours, metric = result.method(result.ours), result.metrics[-1]
    tiles = [(f"{ours.mean(name):.4f}", f"{name} of {ours.name}") for name in result.metrics]
    for key in dict.fromkeys((result.factorization, result.reference)):
        difference = ours.mean(metric) - result.method(key).mean(metric)
        tiles.append((f"{difference:+.4f}", f"{metric} against {result.method(key).name}"))
    speedup = format_speedup(result.speedup(ours))
    tiles.append((speedup, f"speed-up to the best quality of {result.method(result.reference).name}"))
    return Tiles([tile for tile in tiles if "nan" not in tile[0] and tile[0] != "-"])


def _table(result: CompareResult) -> Table:
    rows = []
    for method in result.methods:
        metrics = [
            Cell(
                format_metric(method.mean(m), method.spread(m)),
                strong=bool(result.mark(method, m)),
                note="level with the best" if result.mark(method, m) == "level" else "",
            )
            for m in result.metrics
        ]
        time = Cell(format_seconds(method.seconds), note=format_parts(method.parts).replace(" + ", "\n+ "))
        speedup = Cell(format_speedup(result.speedup(method)))
        goal = Cell(format_to_goal(result.seconds_to_goal(method)))
        read = Cell(
            format_rows(method, result.total_rows), note=format_bytes(method.table_bytes) if method.table_bytes else ""
        )
        rows.append([Cell(method.name), *metrics, read, time, goal, speedup])
    seeds = max(len(method.seeds) for method in result.methods)
    spread = f"Mean ± standard deviation over {seeds} seeds. " if seeds > 1 else "One seed. "
    return Table(
        header=("Method", *result.metrics, "Rows and tables", "Time", "Time to goal", "Speed-up"),
        rows=rows,
        marked=[method.key for method in result.methods].index(result.ours),
        caption=spread
        + "Ties in a ranking count against the model. Bold: the best, and what the seeds cannot tell from it. Rows: "
        + "distinct rows that the network trains on; the factorization reads all. Below, bytes of the tables. "
        + "Time: wall time to the finished model, all parts included. Time to goal: until the best "
        + f"{result.goal_metric} of {result.method(result.reference).name} on {result.curve_of}. Speed-up: its time to "
        + "goal divided by this one.",
    )


def _quality_against_time(result: CompareResult) -> Plot | None:
    metric = result.metrics[-1]
    timed = [m for m in result.methods if m.seconds > 0 and not math.isnan(m.mean(metric))]
    if not timed:
        return None
    with rc_context(PLOT_STYLE):
        figure, axes = chart("Seconds (log scale)", metric)
        for method in timed:
            times = [seed.total_seconds for seed in method.seeds]
            centre, value = method.seconds, method.mean(metric)
            spread = method.spread(metric)
            axes.errorbar(
                centre,
                value,
                yerr=None if math.isnan(spread) else spread,
                xerr=[[centre - min(times)], [max(times) - centre]],
                linestyle="none",
                markersize=11 if method.key == result.ours else 8,
                markeredgewidth=0,
                elinewidth=1.4,
                label=method.name,
                **_look(result, method),
            )
        for method in result.methods:
            if method not in timed and not math.isnan(method.mean(metric)):
                axes.axhline(method.mean(metric), color=MUTED, linewidth=1.2, linestyle="--", label=method.name)
        _log_seconds(axes)
        axes.margins(x=0.08, y=0.1)
        plot_legend(figure, axes)
        return Plot(
            plot_svg(figure, "quality"),
            f"{metric} against wall time to the finished model, factorization included. Up and to the left "
            "is better. Bars: standard deviation of the metric and range of the times over the seeds."
            + (" Dashed: no training." if len(timed) < len(result.methods) else ""),
            "Quality against time",
        )


def _training_curves(result: CompareResult) -> Plot | None:
    metric = result.goal_metric
    with rc_context(PLOT_STYLE):
        figure, axes = chart("Seconds (log scale)", f"{metric}, {result.curve_of}")
        smallest = 0.0
        for method in result.methods:
            points = [(p.seconds, p.metrics[metric]) for p in method.curve if metric in p.metrics and p.seconds > 0]
            if points:
                axes.plot(*zip(*points, strict=True), label=method.name, markersize=3.5, **_look(result, method))
                smallest = min(smallest or points[0][0], points[0][0])
        if not smallest:
            return None
        if not math.isnan(result.goal):
            axes.axhline(result.goal, color=MUTED, linewidth=1.2, linestyle="--", label="Goal")
        _log_seconds(axes)
        plot_legend(figure, axes)
        return Plot(
            plot_svg(figure, "curves"),
            f"{metric} on {result.curve_of} against time from the start of the method: a curve begins after the "
            "factorization, cross-fitting and set-up. Dashed: the goal, the best of "
            f"{result.method(result.reference).name}.",
            "Quality while training",
        )


def _objective(result: CompareResult) -> Plot | None:
    points = [point for point in result.sweeps if math.isfinite(point.objective)]
    if len(points) < 2:
        return None
    with rc_context(PLOT_STYLE):
        figure, axes = chart("Sweep", result.objective_name)
        look = _look(result, result.method(result.factorization))
        axes.plot([point.sweep for point in points], [point.objective for point in points], markersize=5, **look)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=False)
        return Plot(
            plot_svg(figure, "objective"),
            f"{result.objective_name} after each sweep; the last after {format_seconds(points[-1].seconds)}.",
            "Factorization",
        )


def chart(x: str, y: str) -> tuple[Figure, Axes]:
    """A figure of the page's width with one pair of axes, named."""
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _look(result: CompareResult, method: MethodResult) -> dict[str, Any]:
    place = result.methods.index(method)
    return {"color": SERIES[place % len(SERIES)], "marker": _MARKERS[place % len(_MARKERS)]}


def _log_seconds(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    nice = (digit * 10.0**power for power in range(-3, 8) for digit in (1, 2, 5))
    ticks = [tick for tick in nice if low <= tick <= high]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if math.log10(tick) % 1 < 1e-9]
    if len(ticks) > 1:
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def plot_legend(figure: Figure, axes: Axes) -> None:
    """Below the plot."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, handlelength=1.6)
