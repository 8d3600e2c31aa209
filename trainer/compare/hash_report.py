"""What a comparison of hashing methods found: JSON, the terminal's table and the report page."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from recpress.trainer.compare.report import chart, plot_legend
from recpress.trainer.report.page import (
    MUTED,
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
from recpress.trainer.report.results import format_bytes, format_metric, format_seconds, save_json
from tabulate import tabulate  # type: ignore[import-untyped]


@dataclass(frozen=True, kw_only=True)
class HashMethodResult:
    """One method, all seeds."""

    key: str
    name: str
    description: str
    setting: dict[str, Any]
    """What was chosen for it on validation rows."""
    metrics: tuple[dict[str, float], ...]
    """Of the test rows, one for each seed."""
    rows: int
    """Of both tables."""
    row_bytes: int
    map_bytes: int
    """Of the id maps, bit-packed, with their weights; 0 where a formula does."""
    map_seconds: tuple[float, ...] = ()
    train_seconds: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        """Rows and maps."""
        return self.row_bytes + self.map_bytes

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(found[metric] for found in self.metrics)

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds (n - 1); NaN for fewer than two."""
        values = [found[metric] for found in self.metrics]
        return statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class HashResult:
    """The whole comparison."""

    title: str
    methods: tuple[HashMethodResult, ...]
    ours: str
    full: str
    """Key of the full table."""
    metrics: tuple[str, ...]
    data: dict[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def method(self, key: str) -> HashMethodResult:
        return next(method for method in self.methods if method.key == key)

    def kept(self, method: HashMethodResult) -> float:
        """Share of the full table's first metric."""
        metric = self.metrics[0]
        return method.mean(metric) / self.method(self.full).mean(metric)

    def save(self, path: str | Path) -> None:
        """Writes JSON; NaN and infinities become null."""
        save_json(path, asdict(self))


def format_hash_table(result: HashResult) -> str:
    """One method a row."""
    full = result.method(result.full)
    header = ["", *result.metrics, "of full", "rows", "bytes, map included", "of which map", "map made in"]
    rows = [
        [
            ("> " if method.key == result.ours else "  ") + method.name,
            *(format_metric(method.mean(metric), method.spread(metric)) for metric in result.metrics),
            f"{100 * result.kept(method):.1f} %",
            f"{method.rows:,} ({100 * method.rows / full.rows:.3g} %)",
            f"{format_bytes(method.bytes)} ({100 * method.bytes / full.bytes:.3g} %)",
            format_bytes(method.map_bytes) if method.map_bytes else "-",
            format_seconds(statistics.fmean(method.map_seconds)) if method.map_seconds else "-",
        ]
        for method in result.methods
    ]
    align = ("left", *("left" for _ in result.metrics), "right", "right", "right", "right", "right")
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)


def write_hash_report(path: str | Path, result: HashResult) -> None:
    """Writes the page as one HTML file. Raises InputError where it cannot be written."""
    ours, full, metric = result.method(result.ours), result.method(result.full), result.metrics[0]
    others = [m for m in result.methods if m.key not in (ours.key, full.key) and not m.key.startswith("learned")]
    tiles = [
        (f"{ours.mean(metric):.4f}", f"{metric} of {ours.name}"),
        (f"{100 * result.kept(ours):.1f} %", f"of the full table's {metric}"),
        (f"{100 * ours.bytes / full.bytes:.1f} %", "of the full table's bytes, map included"),
    ]
    if others:
        best = max(others, key=lambda method: method.mean(metric))
        tiles.append((f"{ours.mean(metric) - best.mean(metric):+.4f}", f"{metric} against {best.name}"))
    again: list[Code | Facts] = [Code(result.command)] if result.command else []
    again.append(Facts([("Versions", ", ".join(f"{name} {value}" for name, value in result.versions.items()))]))
    again.append(Code(json.dumps(result.config, indent=2, default=str), "Configuration"))
    facts = [(word, f"{value:,}" if isinstance(value, int) else value) for word, value in result.data.items()]
    write_report(
        path,
        result.title,
        [
            Section("", [Tiles(tiles), *map(Paragraph, result.notes)]),
            Section("Results", [_table(result)]),
            Section("Quality by method", [_bars(result)]),
            Section("Methods", [Facts([(m.name, _described(m)) for m in result.methods])]),
            Section("Data", [Facts(facts)]),
            Section("How to run it again", again),
        ],
    )


def _described(method: HashMethodResult) -> str:
    chosen = ", ".join(f"{word} {value}" for word, value in method.setting.items())
    return f"{method.description} Chosen: {chosen}." if chosen else method.description


def _table(result: HashResult) -> Table:
    full = result.method(result.full)
    compressed = [method for method in result.methods if method.key != full.key]
    best = {metric: max((m.mean(metric) for m in compressed), default=math.nan) for metric in result.metrics}
    rows = []
    for method in result.methods:
        cells = [
            Cell(
                format_metric(method.mean(metric), method.spread(metric)),
                strong=method is not full and method.mean(metric) == best[metric],
            )
            for metric in result.metrics
        ]
        note = f"{format_bytes(method.map_bytes)} of it map" if method.map_bytes else ""
        size = f"{format_bytes(method.bytes)} ({100 * method.bytes / full.bytes:.3g} %)"
        rows.append([Cell(method.name), *cells, Cell(f"{method.rows:,}"), Cell(size, note=note)])
    return Table(
        header=("Method", *result.metrics, "Rows", "Bytes"),
        rows=rows,
        marked=[method.key for method in result.methods].index(result.ours),
        caption=("One seed" if len(full.metrics) == 1 else f"Mean ± standard deviation over {len(full.metrics)} seeds")
        + "; float32 rows; bytes with the map included.",
    )


def _bars(result: HashResult) -> Plot:
    metric = result.metrics[0]
    full = result.method(result.full)
    methods = sorted((m for m in result.methods if m is not full), key=lambda method: method.mean(metric))
    with rc_context(PLOT_STYLE):
        figure, axes = chart(metric, "")
        for place, method in enumerate(methods):
            spread = method.spread(metric)
            axes.barh(
                place,
                method.mean(metric),
                xerr=None if math.isnan(spread) else spread,
                color=SERIES[1] if method.key == result.ours else SERIES[0],
                error_kw={"ecolor": MUTED},
            )
        axes.set_yticks(range(len(methods)), [method.name for method in methods])
        axes.axvline(full.mean(metric), color=MUTED, linewidth=1.2, linestyle="--", label="Full table")
        axes.grid(axis="y", visible=False)
        plot_legend(figure, axes)
        return Plot(
            plot_svg(figure, "methods"),
            f"{metric} at the same number of rows; dashed: a row for each id. Bars: standard deviation over seeds.",
            "Quality by method",
        )
