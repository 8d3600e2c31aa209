"""What `compare cadc` found: plain data, and a table for the terminal."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.result import Result
from recpress.trainer.compare.ties import Difference, difference
from recpress.trainer.report.numbers import format_bytes, format_metric, format_seconds, share

VERSION = 2


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
    differences: dict[str, tuple[Difference, ...]] = field(default_factory=dict)
    """Metric -> paired differences of all methods that were run."""
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

    def difference(self, a: MethodResult, b: MethodResult, metric: str) -> Difference | None:
        """Of a - b; None if one of them was not run."""
        try:
            return difference(self.differences.get(metric, ()), a.key, b.key)
        except KeyError:
            return None

    def above(self, a: MethodResult, b: MethodResult, metric: str) -> bool:
        """Whether a is better than b, significantly."""
        found = self.difference(a, b, metric)
        return found is not None and found.above

    def tied(self, a: MethodResult, b: MethodResult, metric: str) -> bool:
        """Whether two methods that were run differ by no more than noise."""
        found = self.difference(a, b, metric)
        return found is not None and found.level

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


def format_speedup(speedup: float) -> str:
    """`12.4x`."""
    if speedup == 0:
        return "not reached"
    return "-" if math.isnan(speedup) else f"{speedup:.3g}x" if speedup < 100 else f"{speedup:.0f}x"


def format_to_goal(seconds: float) -> str:
    """Seconds, or that the quality was never reached."""
    return "not reached" if math.isinf(seconds) else format_seconds(seconds)


def format_parts(method: MethodResult) -> str:
    """`factorize 6.0 s + train 2.1 s`; empty for a single part."""
    parts = method.parts
    return " + ".join(f"{name} {format_seconds(value)}" for name, value in parts.items()) if len(parts) > 1 else ""


def format_examples(method: MethodResult, total: int) -> str:
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
            format_examples(method, result.total_rows),
            format_bytes(method.table_bytes),
            format_seconds(method.seconds),
            format_to_goal(result.seconds_to_goal(method)),
            format_speedup(result.speedup(method)),
            format_parts(method),
        ]
        for method in result.methods
    ]
    align = ("left", *("left" for _ in result.metrics), *("right",) * 5, "left")
    table = tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)
    lines = [str(table), ""]
    if any(result.mark(method, metric) == "tied" for method in result.methods for metric in result.metrics):
        lines.append("=: level with the best, by a paired test over users and seeds at 5 %")
    if not math.isnan(result.goal):
        lines.append(
            f"to goal: time to the best {result.goal_metric} of {result.method(result.reference).name} on "
            f"{result.curve_of}, {result.goal:.4f}; speed-up: its own time / this time"
        )
    lines += [f"warning: {text}" for text in result.warnings]
    return "\n".join(lines).rstrip()
