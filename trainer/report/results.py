"""What a comparison of methods found, as plain data: one JSON file, and a table for the terminal."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recpress.data.errors import InputError
from tabulate import tabulate  # type: ignore[import-untyped]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation while a network trained."""

    seconds: float
    """Training time so far, without the factorization and without the evaluations."""
    epoch: float
    metrics: dict[str, float]
    """Of the validation part or the held-out rows: `CompareResult.curve_of` says which."""


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
    curve: tuple[CurvePoint, ...] = ()

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
    """Sentences that the reader needs: what the data is, how settings were chosen, what fell short."""
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
        """Time of the reference / time of the method; NaN where the method takes none."""
        return self.method(self.reference).seconds / method.seconds if method.seconds > 0 else math.nan

    def save(self, path: str | Path) -> None:
        """Writes JSON; NaN and infinities become null."""
        save_json(path, {"version": VERSION, **asdict(self)})


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
        metrics, notes = tuple(fields.pop("metrics")), tuple(fields.pop("notes"))
        return CompareResult(methods=methods, sweeps=sweeps, metrics=metrics, notes=notes, **fields)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: not the result of a comparison: {error}") from error


def _method(fields: dict[str, Any]) -> MethodResult:
    seeds = []
    for seed in fields.pop("seeds"):
        points = [{**point, "metrics": _with_nan(point["metrics"])} for point in seed.pop("curve")]
        curve = tuple(CurvePoint(**_with_nan(point)) for point in points)
        metrics, seconds = _with_nan(seed.pop("metrics")), _with_nan(seed.pop("seconds"))
        seeds.append(SeedResult(metrics=metrics, seconds=seconds, curve=curve, **seed))
    return MethodResult(seeds=tuple(seeds), **fields)


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


def format_speedup(speedup: float) -> str:
    return "-" if math.isnan(speedup) else f"{speedup:.3g}x" if speedup < 100 else f"{speedup:.0f}x"


def format_table(result: CompareResult) -> str:
    """The comparison as a plain text table, one method a row."""
    header = ["", *result.metrics, "rows", "time", "speed-up", "time by part"]
    rows = [
        [
            ("> " if method.key == result.ours else "  ") + method.name,
            *(format_metric(method.mean(metric), method.spread(metric)) for metric in result.metrics),
            format_rows(method, result.total_rows),
            format_seconds(method.seconds),
            format_speedup(result.speedup(method)),
            format_parts(method.parts),
        ]
        for method in result.methods
    ]
    align = ("left", *("left" for _ in result.metrics), "right", "right", "right", "left")
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)
