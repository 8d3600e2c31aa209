"""What `compare cadc` found: plain data, a table for the terminal and the report page."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.result import Result, seeds_caption
from recpress.trainer.report.charts import Chart, Lines, Series
from recpress.trainer.report.numbers import format_bytes, format_metric, format_seconds, share
from recpress.trainer.report.page import Cell, Report, Section, Table

VERSION = 2
_CRITICAL_T = {2: 4.3, 3: 4.3, 4: 3.2, 5: 2.8}
"""Seeds -> Student's t at 5 %, two-sided. Two seeds use that of three: with 12.7 they could not show any difference."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation while a network trained."""

    seconds: float
    """Since the start of the method: with factorization, cross-fitting and set-up, without evaluations."""
    epoch: float
    metrics: dict[str, float]
    """Of the examples that `CadcResult.curve_of` names."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One sweep of the factorization."""

    sweep: int
    objective: float
    seconds: float
    """Since the factorization began."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One run of a method."""

    seed: int
    metrics: dict[str, float]
    """Of the held-out examples, e.g. {"HR@10": 0.72, "NDCG@10": 0.44}."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by part, e.g. {"factorize": 6.0, "train": 4.0}; together all that it takes to get the model."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the table."""

    key: str
    """Short and unique, e.g. `cadc`."""
    name: str
    description: str
    """One or two sentences for the report."""
    seeds: tuple[SeedResult, ...]
    rows: int | None = None
    """Distinct examples that the network trains on; None without a network."""
    table_bytes: int | None = None
    """Embedding tables as stored, without optimizer state; None without tables."""
    curve: tuple[CurvePoint, ...] = ()
    """Validation quality against time, of one run."""

    def mean(self, metric: str) -> float:
        """Mean over the seeds; NaN if a seed lacks the metric."""
        return statistics.fmean(seed.metrics.get(metric, math.nan) for seed in self.seeds)

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds (n - 1); NaN for fewer than two."""
        values = [seed.metrics.get(metric, math.nan) for seed in self.seeds]
        return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan

    def formatted(self, metric: str) -> str:
        """`0.7201 ± 0.0012`."""
        return format_metric(self.mean(metric), self.spread(metric))

    @property
    def parts(self) -> dict[str, float]:
        """Wall time of each part, mean over the seeds."""
        names = dict.fromkeys(name for seed in self.seeds for name in seed.seconds)
        return {name: statistics.fmean(s.seconds.get(name, 0.0) for s in self.seeds) for name in names}

    @property
    def seconds(self) -> float:
        """Wall time of all parts, mean over the seeds."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class CadcResult(Result):
    """The whole comparison. The last of `metrics` is plotted."""

    methods: tuple[MethodResult, ...]
    """In the order of the table."""
    ours: str
    """Key of the method that the comparison is about."""
    reference: str
    """Key of the method that speed-ups refer to."""
    factorization: str
    """Key of the factorization alone."""
    total_rows: int
    """Train examples of the whole log."""
    sweeps: tuple[SweepPoint, ...] = ()
    objective_name: str = "Objective"
    curve_of: str = "held-out examples"
    """What the curves' metrics were measured on."""
    goal_metric: str = "NDCG@10"
    """Metric of the curves that defines speed-ups."""

    def __post_init__(self) -> None:
        keys = [method.key for method in self.methods]
        assert len(set(keys)) == len(keys), f"keys of methods repeat: {keys}"
        for key in (self.ours, self.reference, self.factorization):
            assert key in keys, f"no method '{key}' among {keys}"

    def method(self, key: str) -> MethodResult:
        return next(method for method in self.methods if method.key == key)

    @property
    def goal(self) -> float:
        """The best quality on the curve of the reference; NaN without one."""
        found = (point.metrics.get(self.goal_metric, -math.inf) for point in self.method(self.reference).curve)
        return max(found, default=math.nan)

    def seconds_to_goal(self, method: MethodResult) -> float:
        """Time of the method to the reference's best quality; infinite if never reached; NaN without curves."""
        goal = self.goal
        if not method.curve or math.isnan(goal):
            return math.nan
        reached = [p.seconds for p in method.curve if p.metrics.get(self.goal_metric, -math.inf) >= goal]
        return min(reached, default=math.inf)

    def speedup(self, method: MethodResult) -> float:
        """Time of the reference to its best quality / time of the method to that quality, both on validation examples;
        0 if the method never reaches it; NaN if the method or the reference has no curve."""
        own, others = self.seconds_to_goal(self.method(self.reference)), self.seconds_to_goal(method)
        return own / others if others > 0 else math.nan

    def tied(self, a: MethodResult, b: MethodResult, metric: str) -> bool:
        """Whether the seeds cannot tell two methods apart: the difference per seed changes its sign, or its mean is not
        significant by a paired t-test at 5 %. With one seed only equal values are tied."""
        found = differences(a, b, metric)
        if len(found) < 2:
            return bool(found) and found[0] == 0
        mean = statistics.fmean(found)
        same_sign = all(d > 0 for d in found) or all(d < 0 for d in found)
        error = statistics.stdev(found) / math.sqrt(len(found))
        return not same_sign or abs(mean) < _CRITICAL_T.get(len(found), 2.5) * error

    def mark(self, method: MethodResult, metric: str) -> str:
        """`best`, `tied` with the best, or an empty string."""
        known = [m for m in self.methods if not math.isnan(m.mean(metric))]
        best = max(known, key=lambda m: m.mean(metric), default=None)
        if best is None or math.isnan(method.mean(metric)):
            return ""
        if method.mean(metric) == best.mean(metric):
            return "best"
        return "tied" if self.tied(method, best, metric) else ""

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}


def differences(a: MethodResult, b: MethodResult, metric: str) -> list[float]:
    """a - b of each seed that both have; a method with one run, such as popularity, has that value for every seed."""
    values = [{seed.seed: seed.metrics.get(metric, math.nan) for seed in method.seeds} for method in (a, b)]
    seeds = max(values, key=len)
    ours, others = ({s: v.get(s, next(iter(v.values()))) for s in seeds} if len(v) == 1 else v for v in values)
    found = [ours[s] - others[s] for s in ours if s in others]
    return [difference for difference in found if not math.isnan(difference)]


def _speedup(speedup: float) -> str:
    if speedup == 0:
        return "not reached"
    return "-" if math.isnan(speedup) else f"{speedup:.3g}x" if speedup < 100 else f"{speedup:.0f}x"


def _to_goal(seconds: float) -> str:
    return "not reached" if math.isinf(seconds) else format_seconds(seconds)


def _parts(method: MethodResult) -> str:
    """`factorize 6.0 s + train 2.1 s`; empty for a single part."""
    parts = method.parts
    return " + ".join(f"{name} {format_seconds(value)}" for name, value in parts.items()) if len(parts) > 1 else ""


def _examples(method: MethodResult, total: int) -> str:
    """`99,417 (10 %)`."""
    return "-" if method.rows is None else f"{method.rows:,} ({share(method.rows, total)})"


def format_table(result: CadcResult) -> str:
    """The comparison as a plain text table, one method per row."""
    header = ["", *result.metrics, "examples", "tables", "time", "to goal", "speed-up", "time by part"]
    marks = {"tied": " ="}
    rows = [
        [
            ("> " if method.key == result.ours else "  ") + method.name,
            *(method.formatted(m) + marks.get(result.mark(method, m), "") for m in result.metrics),
            _examples(method, result.total_rows),
            format_bytes(method.table_bytes),
            format_seconds(method.seconds),
            _to_goal(result.seconds_to_goal(method)),
            _speedup(result.speedup(method)),
            _parts(method),
        ]
        for method in result.methods
    ]
    align = ("left", *("left" for _ in result.metrics), *("right",) * 5, "left")
    table = tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)
    lines = [str(table), ""]
    if any(result.mark(method, metric) == "tied" for method in result.methods for metric in result.metrics):
        lines.append("=: tied with the best, within the noise of the seeds")
    if not math.isnan(result.goal):
        lines.append(
            f"to goal: time to the best {result.goal_metric} of {result.method(result.reference).name} on "
            f"{result.curve_of}, {result.goal:.4f}; speed-up: its own time / this time"
        )
    lines += [f"warning: {text}" for text in result.warnings]
    return "\n".join(lines).rstrip()


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
        difference = ours.mean(metric) - result.method(key).mean(metric)
        tiles.append((f"{difference:+.4f}", f"{metric} against {result.method(key).name}"))
    speedup = _speedup(result.speedup(ours))
    tiles.append((speedup, f"speed-up to the best quality of {result.method(result.reference).name}"))
    return [tile for tile in tiles if "nan" not in tile[0] and tile[0] != "-"]


def _table(result: CadcResult) -> Table:
    rows: list[list[Cell | str]] = []
    for method in result.methods:
        metrics = [
            Cell(method.formatted(m), "tied with the best" if mark == "tied" else "", bool(mark))
            for m in result.metrics
            for mark in [result.mark(method, m)]
        ]
        examples = _examples(method, result.total_rows)
        rows.append(
            [
                method.name,
                *metrics,
                Cell(examples, format_bytes(method.table_bytes) if method.table_bytes else ""),
                Cell(format_seconds(method.seconds), _parts(method).replace(" + ", "\n+ ")),
                _to_goal(result.seconds_to_goal(method)),
                _speedup(result.speedup(method)),
            ]
        )
    return Table(
        header=("Method", *result.metrics, "Examples and tables", "Time", "Time to goal", "Speed-up"),
        rows=rows,
        highlighted=[method.key for method in result.methods].index(result.ours),
        caption=seeds_caption(max(len(method.seeds) for method in result.methods))
        + "Ties in a ranking count against the model. Bold: the best, and what the seeds cannot tell from it. "
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
