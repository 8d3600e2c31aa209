"""The report page of `compare cadc`."""

from __future__ import annotations

import math
from typing import Any

from recpress.trainer.compare.cadc_result import (
    CadcResult,
    MethodResult,
    format_examples,
    format_parts,
    format_speedup,
    format_to_goal,
)
from recpress.trainer.compare.result import seeds_caption
from recpress.trainer.report.charts import Chart, Lines, Series
from recpress.trainer.report.numbers import format_bytes, format_seconds
from recpress.trainer.report.page import Cell, Report, Section, Table


def cadc_report(result: CadcResult) -> Report:
    """The report page; it has only those charts that the result has points for."""
    charts = [chart for chart in (_quality(result), _curves(result), _objective(result)) if chart is not None]
    return result.to_report(
        _tiles(result),
        [
            Section(title="Results", table=_table(result)),
            *(Section(title=chart.title, charts=[chart]) for chart in charts),
            Section(title="Methods", facts=[(method.name, method.description) for method in result.methods]),
        ],
        summary=[_summary(result)],
    )


def _summary(result: CadcResult) -> str:
    ours, metric = result.method(result.ours), result.metrics[-1]
    text = f"{ours.name}: {metric} {ours.formatted(metric)}"
    if ours.rows is not None:
        text += f", its network trained on {ours.rows:,} of {result.total_rows:,} examples"
    text += f", in {format_seconds(ours.seconds)}"
    for key in dict.fromkeys((result.factorization, result.reference)):
        other = result.method(key)
        text += f". {other.name}: {other.formatted(metric)} in {format_seconds(other.seconds)}"
        if pair := result.difference(ours, other, metric):
            text += f" (difference {pair.in_words()})"
    text += ". Times include the factorization."
    if not math.isnan(result.goal):
        reference = result.method(result.reference)
        text += f" {reference.name} takes {format_seconds(result.seconds_to_goal(reference))} to its best "
        text += f"{result.goal_metric} on {result.curve_of}, {result.goal:.4f}; "
        seconds = result.seconds_to_goal(ours)
        reached = f"reaches it in {format_seconds(seconds)}" if math.isfinite(seconds) else "does not reach it"
        text += f"{ours.name} {reached}."
    return text


def _tiles(result: CadcResult) -> list[tuple[str, str]]:
    ours, metric = result.method(result.ours), result.metrics[-1]
    tiles = [(f"{ours.mean(name):.4f}", f"{name} of {ours.name}") for name in result.metrics]
    for key in dict.fromkeys((result.factorization, result.reference)):
        other = result.method(key)
        within = ", within noise" if result.tied(ours, other, metric) else ""
        tiles.append((f"{ours.mean(metric) - other.mean(metric):+.4f}", f"{metric} against {other.name}{within}"))
    speedup = format_speedup(result.speedup(ours))
    tiles.append((speedup, f"speed-up to the best quality of {result.method(result.reference).name}"))
    return [tile for tile in tiles if "nan" not in tile[0] and tile[0] != "-"]


def _table(result: CadcResult) -> Table:
    rows: list[list[Cell | str]] = []
    for method in result.methods:
        metrics = [
            Cell(method.formatted(m), "level with the best" if mark == "tied" else "", bool(mark))
            for m in result.metrics
            for mark in [result.mark(method, m)]
        ]
        examples = format_examples(method, result.total_rows)
        rows.append(
            [
                method.name,
                *metrics,
                Cell(examples, format_bytes(method.table_bytes) if method.table_bytes else ""),
                Cell(format_seconds(method.seconds), format_parts(method).replace(" + ", "\n+ ")),
                format_to_goal(result.seconds_to_goal(method)),
                format_speedup(result.speedup(method)),
            ]
        )
    return Table(
        header=("Method", *result.metrics, "Examples and tables", "Time", "Time to goal", "Speed-up"),
        rows=rows,
        highlighted=[method.key for method in result.methods].index(result.ours),
        caption=seeds_caption(max(len(method.seeds) for method in result.methods))
        + "Ties in a ranking count against the model. Bold: the best, and what a paired test over users and seeds "
        "cannot tell from it at 5 %. "
        "Examples: distinct examples that the network trains on; the factorization reads all. Below: bytes of the "
        "tables. Time: wall time to the finished model, all parts included. Time to goal: until the best "
        f"{result.goal_metric} of {result.method(result.reference).name} on {result.curve_of}. Speed-up: its time to "
        "goal divided by this one.",
    )


def _series(result: CadcResult, method: MethodResult, x: list[float], y: list[float], **more: Any) -> Series:
    return Series(label=method.name, x=x, y=y, color=result.methods.index(method), **more)


def _quality(result: CadcResult) -> Chart | None:
    metric = result.metrics[-1]
    measured = [m for m in result.methods if not math.isnan(m.mean(metric))]
    timed = [m for m in measured if m.seconds > 0]
    if not timed:
        return None
    series = []
    for method in timed:
        times = [sum(seed.seconds.values()) for seed in method.seeds]
        series.append(
            _series(
                result, method, [method.seconds], [method.mean(metric)], y_error=[method.spread(metric)],
                x_range=(min(times), max(times)), size=11 if method.key == result.ours else 8,
            )
        )  # fmt: skip
    untimed = [(m.name, m.mean(metric)) for m in measured if m not in timed]
    panel = Lines(x_label="Seconds", y_label=metric, series=series, levels=untimed, log_x=True)
    return Chart(
        title="Quality against time",
        caption=f"{metric} against wall time to the finished model, factorization included. Up and to the left is "
        "better. Bars: standard deviation of the metric and range of the times over the seeds."
        + (" Dashed: no training." if untimed else ""),
        panels=[panel],
    )


def _curves(result: CadcResult) -> Chart | None:
    metric = result.goal_metric
    series = []
    for method in result.methods:
        points = [(p.seconds, p.metrics[metric]) for p in method.curve if metric in p.metrics and p.seconds > 0]
        if points:
            x, y = ([*values] for values in zip(*points, strict=True))
            series.append(_series(result, method, x, y, size=3.5))
    if not series:
        return None
    goal = [] if math.isnan(result.goal) else [("Goal", result.goal)]
    y_label = f"{metric}, {result.curve_of}"
    return Chart(
        title="Quality while training",
        caption=f"{metric} on {result.curve_of} against time from the start of the method: a curve begins after the "
        "factorization, cross-fitting and set-up. Dashed: the goal, the best of "
        f"{result.method(result.reference).name}.",
        panels=[Lines(x_label="Seconds", y_label=y_label, series=series, levels=goal, log_x=True)],
    )


def _objective(result: CadcResult) -> Chart | None:
    points = [point for point in result.sweeps if math.isfinite(point.objective)]
    if len(points) < 2:
        return None
    sweeps, objectives = [float(point.sweep) for point in points], [point.objective for point in points]
    series = [_series(result, result.method(result.factorization), sweeps, objectives)]
    return Chart(
        title="Factorization",
        caption=f"{result.objective_name} after each sweep; the last after {format_seconds(points[-1].seconds)}.",
        panels=[Lines(x_label="Sweep", y_label=result.objective_name, series=series)],
        legend=False,
    )
