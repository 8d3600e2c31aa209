"""What `recpress compare both` found: JSON, the terminal's table and the report page."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import FuncFormatter, LogLocator
from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.report import chart, plot_legend
from recpress.trainer.compare.ties import paired_difference
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
from recpress.trainer.report.results import format_bytes, format_metric, save_json


@dataclass(frozen=True, kw_only=True)
class Point:
    """One level of bytes with one share of the rows."""

    level: float
    form: str
    """In words: storage and rows."""
    rate: float
    """Share of the log that the network was trained on; 0: no network, the factors' own scores."""
    rows: int
    """Of both id tables."""
    bytes: int
    """Stored: rows with their scales, maps bit-packed."""
    serving_bytes: int
    """With the maps as `LearnedHash` serves them."""
    rows_read: int
    epochs: int = 0
    """Of the network; 0: the factors' own ranking."""
    error: float
    """Weighted distortion of the vectors, as a share."""
    metrics: dict[str, tuple[float, ...]]
    """Of the held-out rows, a value for each seed."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.metrics[metric])

    def spread(self, metric: str) -> float:
        values = self.metrics[metric]
        return statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class BothResult:
    """The whole comparison; its first level is the full one."""

    title: str
    points: tuple[Point, ...]
    metrics: tuple[str, ...]
    full_bytes: int
    """Of the id tables in float32, a row an id."""
    total_rows: int
    data: dict[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def full(self, rate: float) -> Point:
        """The point of most bytes with this share of the rows."""
        return max((point for point in self.points if point.rate == rate), key=lambda point: point.level)

    def kept(self, point: Point, metric: str) -> float:
        """Share of the metric that the full tables have with the same share of the rows; NaN where that is 0."""
        full = self.full(point.rate).mean(metric)
        return point.mean(metric) / full if full else math.nan

    def level(self, point: Point, metric: str) -> bool:
        """Whether the metric is within noise of that of full tables; False with one seed, which shows no noise."""
        full = self.full(point.rate)
        if point is full or len(point.metrics[metric]) < 2:
            return False
        pairs = ([np.array([value]) for value in of.metrics[metric]] for of in (point, full))
        mean, noise = paired_difference(*pairs)
        return abs(mean) <= noise

    def kept_in_words(self, point: Point, metric: str) -> str:
        """`99.6`; `99.9 =` where it is within noise of full tables."""
        return f"{100 * self.kept(point, metric):.1f}{' =' if self.level(point, metric) else ''}"

    def ordered(self) -> list[Point]:
        """By share of the rows, then from most bytes to least."""
        return sorted(self.points, key=lambda point: (point.rate, -point.level))

    def save(self, path: str | Path) -> None:
        """Writes JSON; NaN and infinities become null."""
        save_json(path, asdict(self))


def rows_read(point: Point, total: int) -> str:
    """`99,264 (10 %), 3 epochs`."""
    if not point.rate:
        return "factors alone"
    if not point.epochs:
        return f"of {point.rate:.0%}, 0 epochs chosen"
    epochs = f"{point.epochs} epoch{'s' if point.epochs > 1 else ''}"
    return f"{point.rows_read:,} ({100 * point.rows_read / total:.3g} %), {epochs}"


def format_both_table(result: BothResult) -> str:
    """One point a row."""
    header = [
        "network trained on rows", "tables", *result.metrics, "of full", "bytes stored", "bytes at serving",
        "distortion",
    ]  # fmt: skip
    rows = [
        [
            rows_read(point, result.total_rows),
            point.form,
            *(format_metric(point.mean(m), point.spread(m)) for m in result.metrics),
            " / ".join(result.kept_in_words(point, m) for m in result.metrics) + " %",
            f"{format_bytes(point.bytes)} ({100 * point.bytes / result.full_bytes:.3g} %)",
            f"{format_bytes(point.serving_bytes)} ({100 * point.serving_bytes / result.full_bytes:.3g} %)",
            f"{100 * point.error:.2g} %",
        ]
        for point in result.ordered()
    ]
    align = ("left", "left", *("left" for _ in result.metrics), *["right"] * 4)
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True)


def write_both_report(path: str | Path, result: BothResult) -> None:
    """Writes the page as one HTML file. Raises InputError where it cannot be written."""
    metric = result.metrics[-1]
    sampled = [p for p in result.ordered() if 0 < p.rate < 1] or [p for p in result.ordered() if not p.rate]
    small = min(sampled, key=lambda point: abs(math.log(4 * point.level)))
    tiles = [
        (f"{small.mean(metric):.4f}", f"{metric} with {small.form}"),
        (f"{100 * result.kept(small, metric):.1f} %", "of what full tables give on the same rows of the log"),
        *([(f"{100 * small.rows_read / result.total_rows:.3g} %", "of the log's rows read")] if small.rate else []),
        (f"{100 * small.bytes / result.full_bytes:.1f} %", "of the full tables' bytes, maps included"),
    ]
    again: list[Code | Facts] = [Code(result.command)] if result.command else []
    again.append(Facts([("Versions", ", ".join(f"{name} {value}" for name, value in result.versions.items()))]))
    again.append(Code(json.dumps(result.config, indent=2, default=str), "Configuration"))
    facts = [(word, f"{value:,}" if isinstance(value, int) else value) for word, value in result.data.items()]
    write_report(
        path,
        result.title,
        [
            Section("", [Tiles(tiles), *map(Paragraph, result.notes)]),
            Section("Quality against bytes and rows read", [_plot(result)]),
            Section("Results", [_table(result)]),
            Section("Data", [Facts(facts)]),
            Section("How to run it again", again),
        ],
    )


def _table(result: BothResult) -> Table:
    rows = [
        [
            Cell(rows_read(point, result.total_rows)),
            Cell(point.form),
            *(
                Cell(format_metric(point.mean(m), point.spread(m)), note=f"{result.kept_in_words(point, m)} % of full")
                for m in result.metrics
            ),
            Cell(format_bytes(point.bytes), note=f"{100 * point.bytes / result.full_bytes:.3g} %"),
            Cell(format_bytes(point.serving_bytes), note=f"{100 * point.serving_bytes / result.full_bytes:.3g} %"),
        ]
        for point in result.ordered()
    ]
    seeds = max(len(values) for point in result.points for values in point.metrics.values())
    return Table(
        header=("Network trained on", "Tables", *result.metrics, "Bytes stored", "Bytes at serving"),
        rows=rows,
        caption=("One seed. " if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds. ")
        + "Bytes with maps and scales; 100 % is float32; = is within noise of full tables.",
    )


def _plot(result: BothResult) -> Plot:
    metric = result.metrics[-1]
    with rc_context(PLOT_STYLE):
        figure, axes = chart("Bytes of the tables, maps included (log scale)", metric)
        for place, rate in enumerate(sorted({point.rate for point in result.points})):
            points = sorted((p for p in result.points if p.rate == rate), key=lambda point: point.bytes)
            name = "Factors alone" if not rate else f"Network on {rate:.0%} of the rows"
            spreads = [point.spread(metric) for point in points]
            axes.errorbar(
                [point.bytes for point in points],
                [point.mean(metric) for point in points],
                yerr=None if any(map(math.isnan, spreads)) else spreads,
                color=SERIES[place % len(SERIES)],
                marker="osD^v"[place % 5],
                markersize=5,
                label=name,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value))))
        axes.minorticks_off()
        plot_legend(figure, axes)
        return Plot(
            plot_svg(figure, "both"),
            f"{metric} against the bytes of the tables. The point on the right of each line has full float32 tables.",
            "Quality against bytes and rows read",
        )
