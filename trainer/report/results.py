"""What a comparison of methods found, as plain data: one JSON file, and a table for the terminal."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.data.errors import InputError

VERSION = 2
_T = {2: 4.3, 3: 4.3, 4: 3.2, 5: 2.8}
"""Seeds -> Student's t at 5 %, two-sided; for two seeds that of three, as the 12.7 of two would tell nothing apart."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation while a network trained."""

    seconds: float
    """Since the start of the method: factorization, cross-fitting and set-up included, evaluations excluded."""
    epoch: float
    metrics: dict[str, float]
    """Of the rows that `CompareResult.curve_of` names."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One sweep (or epoch) of the factorization."""

    sweep: int
    objective: float
    seconds: float
    """Since the factorization began."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One run of a method."""

    seed: int
    metrics: dict[str, float]
    """Of the held-out rows, e.g. {"HR@10": 0.72, "NDCG@10": 0.44}."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by part, e.g. {"factorize": 6.0, "train": 4.0}: all that it takes to get the model."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the table."""

    key: str
    """Short and unique, e.g. `cadc`."""
    name: str
    """As the table shows it."""
    description: str
    """One or two sentences for the report: what is done."""
    seeds: tuple[SeedResult, ...]
    rows: int | None = None
    """Distinct rows of the log that the network trains on; None where there is no network."""
    table_bytes: int | None = None
    """Embedding tables as stored, without optimizer states; None where there are none."""
    curve: tuple[CurvePoint, ...] = ()
    """Quality against time, of one run on a log without the rows that it is measured on."""

    def mean(self, metric: str) -> float:
        """Mean over the seeds; NaN where a seed lacks the metric."""
        return statistics.fmean(seed.metrics.get(metric, math.nan) for seed in self.seeds)

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds (n - 1); NaN for fewer than two."""
        values = [seed.metrics.get(metric, math.nan) for seed in self.seeds]
        return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan

    @property
    def seconds(self) -> float:
        """Wall time, all parts, mean over the seeds."""
        return statistics.fmean(seed.total_seconds for seed in self.seeds)

    @property
    def parts(self) -> dict[str, float]:
        """Wall time of each part, mean over the seeds."""
        names = dict.fromkeys(name for seed in self.seeds for name in seed.seconds)
        return {name: statistics.fmean(s.seconds.get(name, 0.0) for s in self.seeds) for name in names}


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """A comparison: what the terminal's table and the report page are made from."""

    title: str
    methods: tuple[MethodResult, ...]
    """In the order of the table."""
    ours: str
    """Key of the method that the comparison is about."""
    reference: str
    """Key of the method that speed-ups and differences refer to."""
    factorization: str
    """Key of the factorization alone."""
    metrics: tuple[str, ...] = ("HR@10", "NDCG@10")
    """Columns of the table; the last one is plotted."""
    total_rows: int
    """Rows of train of the whole log."""
    sweeps: tuple[SweepPoint, ...] = ()
    objective_name: str = "Objective"
    curve_of: str = "held-out rows"
    """What the curves' metrics were measured on."""
    data: dict[str, str | int | float] = field(default_factory=dict)
    """Facts of the log, by the words that the report shows."""
    notes: tuple[str, ...] = ()
    """Sentences that the reader needs: what the data is, how settings were chosen."""
    warnings: tuple[str, ...] = ()
    """What fell short, one sentence each; shown first."""
    goal_metric: str = "NDCG@10"
    """Metric of the curves that speed-ups go by."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole configuration, JSON values."""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        keys = [method.key for method in self.methods]
        assert len(set(keys)) == len(keys), f"keys of methods repeat: {keys}"
        for key in (self.ours, self.reference, self.factorization):
            assert key in keys, f"no method '{key}' among {keys}"
        assert all(method.seeds for method in self.methods), "a method without a run"

    def method(self, key: str) -> MethodResult:
        return next(method for method in self.methods if method.key == key)

    def speedup(self, method: MethodResult) -> float:
        """Time of the reference to its best quality / time of the method to that quality, both on validation rows; 0
        where the method never reaches it; NaN where the method or the reference has no curve."""
        own, others = self.seconds_to_goal(self.method(self.reference)), self.seconds_to_goal(method)
        return own / others if others > 0 else math.nan

    @property
    def goal(self) -> float:
        """The best quality on the curve of the reference; NaN without one."""
        found = (point.metrics.get(self.goal_metric, -math.inf) for point in self.method(self.reference).curve)
        return max(found, default=math.nan)

    def seconds_to_goal(self, method: MethodResult) -> float:
        """Time of the method to the reference's best quality; infinite where never; NaN without curves."""
        goal = self.goal
        if not method.curve or math.isnan(goal):
            return math.nan
        reached = [p.seconds for p in method.curve if p.metrics.get(self.goal_metric, -math.inf) >= goal]
        return min(reached, default=math.inf)

    def level(self, a: MethodResult, b: MethodResult, metric: str) -> bool:
        """Whether seeds cannot tell two methods apart: the difference, seed by seed, changes its sign or its mean is
        not significant by a paired t-test at 5 %. With one seed only equal values are level."""
        found = differences(a, b, metric)
        if len(found) < 2:
            return bool(found) and found[0] == 0
        mean = statistics.fmean(found)
        same_sign = all(d > 0 for d in found) or all(d < 0 for d in found)
        return not same_sign or abs(mean) < _T.get(len(found), 2.5) * statistics.stdev(found) / math.sqrt(len(found))

    def mark(self, method: MethodResult, metric: str) -> str:
        """`best`, `level` with the best, or nothing."""
        known = [m for m in self.methods if not math.isnan(m.mean(metric))]
        best = max(known, key=lambda m: m.mean(metric), default=None)
        if best is None or math.isnan(method.mean(metric)):
            return ""
        if method.mean(metric) == best.mean(metric):
            return "best"
        return "level" if self.level(method, best, metric) else ""

    def save(self, path: str | Path) -> None:
        """Writes JSON; NaN and infinities become null."""
        save_json(path, {"version": VERSION, **asdict(self)})


def differences(a: MethodResult, b: MethodResult, metric: str) -> list[float]:
    """a - b of each seed that both have; a method with one run, such as popularity, is the same for every seed."""
    values = [{seed.seed: seed.metrics.get(metric, math.nan) for seed in method.seeds} for method in (a, b)]
    seeds = max(values, key=len)
    ours, others = ({s: v.get(s, next(iter(v.values()))) for s in seeds} if len(v) == 1 else v for v in values)
    found = [ours[s] - others[s] for s in ours if s in others]
    return [difference for difference in found if not math.isnan(difference)]


def save_json(path: str | Path, fields: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all; NaN and infinities become null."""
    write_whole(path, json.dumps(_finite(fields), indent=1, allow_nan=False) + "\n")


def load_result(path: str | Path) -> CompareResult:
    """Reads what `CompareResult.save` wrote. Raises InputError where the file is something else."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
            raise InputError(f"{path}: expected the result of a comparison, version {VERSION}")
        methods = tuple(_method(method) for method in fields.pop("methods"))
        sweeps = tuple(SweepPoint(**_with_nan(sweep)) for sweep in fields.pop("sweeps"))
        texts: dict[str, Any] = {name: tuple(fields.pop(name)) for name in ("metrics", "notes", "warnings")}
        return CompareResult(methods=methods, sweeps=sweeps, **texts, **fields)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: not the result of a comparison: {error}") from error


def _method(fields: dict[str, Any]) -> MethodResult:
    seeds = []
    for seed in fields.pop("seeds"):
        metrics, seconds = _with_nan(seed.pop("metrics")), _with_nan(seed.pop("seconds"))
        seeds.append(SeedResult(metrics=metrics, seconds=seconds, **seed))
    points = [{**point, "metrics": _with_nan(point["metrics"])} for point in fields.pop("curve")]
    curve = tuple(CurvePoint(**_with_nan(point)) for point in points)
    return MethodResult(seeds=tuple(seeds), curve=curve, **fields)


def _with_nan(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file under a temporary name beside it, then renames it."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def format_metric(mean: float, spread: float) -> str:
    """`0.7201 ± 0.0012`, without the spread where there is one seed."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `8.1 s`, `93 s`, `12.4 min`, `3.2 h`."""
    if not seconds > 0:
        return "-"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_parts(parts: dict[str, float]) -> str:
    """`factorize 6.0 s + train 2.1 s`; nothing for a single part."""
    return " + ".join(f"{name} {format_seconds(value)}" for name, value in parts.items()) if len(parts) > 1 else ""


def format_rows(method: MethodResult, total: int) -> str:
    """`99,417 (10 %)`."""
    return "-" if method.rows is None else f"{method.rows:,} ({100 * method.rows / max(total, 1):.3g} %)"


def format_bytes(size: int | None) -> str:
    """`3.5 MB`; `-` for None."""
    if size is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def format_to_goal(seconds: float) -> str:
    """Seconds, or that the quality was not reached."""
    return "not reached" if math.isinf(seconds) else format_seconds(seconds)


def format_speedup(speedup: float) -> str:
    if speedup == 0:
        return "not reached"
    return "-" if math.isnan(speedup) else f"{speedup:.3g}x" if speedup < 100 else f"{speedup:.0f}x"


def format_table(result: CompareResult) -> str:
    """The comparison as a plain text table, one method a row."""
    header = ["", *result.metrics, "rows", "tables", "time", "to goal", "speed-up", "time by part"]
    rows = [
        [
            ("> " if method.key == result.ours else "  ") + method.name,
            *(
                format_metric(method.mean(metric), method.spread(metric))
                + (" =" if result.mark(method, metric) == "level" else "")
                for metric in result.metrics
            ),
            format_rows(method, result.total_rows),
            format_bytes(method.table_bytes),
            format_seconds(method.seconds),
            format_to_goal(result.seconds_to_goal(method)),
            format_speedup(result.speedup(method)),
            format_parts(method.parts),
        ]
        for method in result.methods
    ]
    align = ("left", *("left" for _ in result.metrics), *("right",) * 5, "left")
    table = tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)
    lines = [str(table), ""]
    if any(result.mark(method, metric) == "level" for method in result.methods for metric in result.metrics):
        lines.append("=: level with the best, within the noise of the seeds")
    if not math.isnan(result.goal):
        lines.append(
            f"to goal: time to the best {result.goal_metric} of {result.method(result.reference).name} on "
            f"{result.curve_of}, {result.goal:.4f}; speed-up: its own time / this time"
        )
    lines += [f"warning: {text}" for text in result.warnings]
    return "\n".join(lines).rstrip()
