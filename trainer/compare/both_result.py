"""What `compare both` found: plain data, a table for the terminal and the report page."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.result import Result, seeds_caption
from recpress.trainer.compare.ties import LEVEL, paired_difference
from recpress.trainer.report.charts import Chart, Lines, Series
from recpress.trainer.report.numbers import format_bytes, format_metric, share
from recpress.trainer.report.page import Cell, Report, Section, Table


@dataclass(frozen=True, kw_only=True)
class Point:
    """One level of bytes with one sample rate."""

    level: float
    form: str
    """In words: storage and rows."""
    rate: float
    """Share of the log that the network was trained on; 0: no network, the factors' own scores."""
    rows: int
    """Embedding rows of both id tables."""
    bytes: int
    """Stored: rows with their scales, maps bit-packed."""
    serving_bytes: int
    """With the maps as `LearnedHash` serves them."""
    rows_read: int
    """Examples that the network was trained on."""
    epochs: int = 0
    """Of the network; 0: the factors' own ranking."""
    error: float
    """Weighted distortion of the vectors, as a share."""
    metrics: dict[str, tuple[float, ...]]
    """Of the held-out examples, a value per seed."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.metrics[metric])

    def spread(self, metric: str) -> float:
        values = self.metrics[metric]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def formatted(self, metric: str) -> str:
        """`0.7201 ± 0.0012`."""
        return format_metric(self.mean(metric), self.spread(metric))


@dataclass(frozen=True, kw_only=True)
class BothResult(Result):
    """The whole comparison; its largest level is the full one. The last of `metrics` is plotted."""

    points: tuple[Point, ...]
    full_bytes: int
    """Of the id tables in float32 with one row per id."""
    total_rows: int
    """Train examples of the whole log."""

    def full(self, rate: float) -> Point:
        """The point of most bytes with this sample rate."""
        return max((point for point in self.points if point.rate == rate), key=lambda point: point.level)

    def of_full(self, point: Point, metric: str) -> float:
        """Share of the metric that full tables have with the same sample rate; NaN if that is 0."""
        full = self.full(point.rate).mean(metric)
        return point.mean(metric) / full if full else math.nan

    def tied(self, point: Point, metric: str) -> bool:
        """Whether the metric is within noise of that of full tables; False with one seed, which shows no noise."""
        full = self.full(point.rate)
        if point is full or len(point.metrics[metric]) < 2:
            return False
        pairs = ([np.array([value]) for value in of.metrics[metric]] for of in (point, full))
        return paired_difference(*pairs)[2] > LEVEL

    def of_full_in_words(self, point: Point, metric: str) -> str:
        """`99.6`; `99.9 =` if it is within noise of full tables."""
        return f"{100 * self.of_full(point, metric):.1f}{' =' if self.tied(point, metric) else ''}"

    def examples(self, point: Point) -> str:
        """What a network was trained on: `99,264 (10 %), 3 epochs`."""
        if not point.rate:
            return "factors alone"
        if not point.epochs:
            return f"of {point.rate:.0%}, 0 epochs chosen"
        epochs = f"{point.epochs} epoch{'s' if point.epochs > 1 else ''}"
        return f"{point.rows_read:,} ({share(point.rows_read, self.total_rows)}), {epochs}"

    def ordered(self) -> list[Point]:
        """By sample rate, then from most bytes to least."""
        return sorted(self.points, key=lambda point: (point.rate, -point.level))


def format_both_table(result: BothResult) -> str:
    """One point per row."""
    header = [
        "network trained on", "tables", *result.metrics, "of full", "bytes stored", "bytes at serving", "distortion",
    ]  # fmt: skip
    rows = [
        [
            result.examples(point),
            point.form,
            *map(point.formatted, result.metrics),
            " / ".join(result.of_full_in_words(point, m) for m in result.metrics) + " %",
            f"{format_bytes(point.bytes)} ({share(point.bytes, result.full_bytes)})",
            f"{format_bytes(point.serving_bytes)} ({share(point.serving_bytes, result.full_bytes)})",
            f"{100 * point.error:.2g} %",
        ]
        for point in result.ordered()
    ]
    align = ("left", "left", *("left" for _ in result.metrics), *["right"] * 4)
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True)


def both_report(result: BothResult) -> Report:
    """The report page. Its key figures are those of about a quarter of the bytes."""
    metric = result.metrics[-1]
    sampled = [p for p in result.ordered() if 0 < p.rate < 1] or [p for p in result.ordered() if not p.rate]
    small = min(sampled, key=lambda point: abs(math.log(4 * point.level)))
    tiles = [
        (f"{small.mean(metric):.4f}", f"{metric} with {small.form}"),
        (f"{100 * result.of_full(small, metric):.1f} %", "of full tables' quality with the same examples"),
        *([(share(small.rows_read, result.total_rows), "of the log's examples read")] if small.rate else []),
        (f"{100 * small.bytes / result.full_bytes:.1f} %", "of the full tables' bytes, maps included"),
    ]
    chart = _chart(result)
    return result.to_report(
        tiles, [Section(title=chart.title, charts=[chart]), Section(title="Results", table=_table(result))]
    )


def _table(result: BothResult) -> Table:
    rows: list[list[Cell | str]] = [
        [
            result.examples(point),
            point.form,
            *(Cell(point.formatted(m), f"{result.of_full_in_words(point, m)} % of full") for m in result.metrics),
            Cell(format_bytes(point.bytes), share(point.bytes, result.full_bytes)),
            Cell(format_bytes(point.serving_bytes), share(point.serving_bytes, result.full_bytes)),
        ]
        for point in result.ordered()
    ]
    return Table(
        header=("Network trained on", "Tables", *result.metrics, "Bytes stored", "Bytes at serving"),
        rows=rows,
        caption=seeds_caption(max(len(values) for point in result.points for values in point.metrics.values()))
        + "Bytes with maps and scales; 100 % is float32; = is within noise of full tables.",
    )


def _chart(result: BothResult) -> Chart:
    metric, series = result.metrics[-1], []
    for color, rate in enumerate(sorted({point.rate for point in result.points})):
        points = sorted((p for p in result.points if p.rate == rate), key=lambda point: point.bytes)
        series.append(
            Series(
                label=f"Network on {rate:.0%} of the examples" if rate else "Factors alone",
                x=[point.bytes for point in points],
                y=[point.mean(metric) for point in points],
                y_error=[point.spread(metric) for point in points],
                color=color,
            )
        )
    panel = Lines(
        x_label="Bytes of the tables, maps included",
        y_label=metric,
        series=series,
        log_x=True,
        format_x=lambda value: format_bytes(round(value)),
    )
    return Chart(
        title="Quality against bytes and examples read",
        caption=f"{metric} against the bytes of the tables. The rightmost point of each line has full float32 tables.",
        panels=[panel],
    )
