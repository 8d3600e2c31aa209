"""What a comparison of hashing methods found: JSON, the terminal's table and the report page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.report import chart, plot_legend
from recpress.trainer.compare.ties import Difference, difference, places
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


@dataclass(frozen=True, kw_only=True)
class HashMethodResult:
    """One method, all seeds."""

    key: str
    name: str
    description: str
    setting: dict[str, Any]
    """What was chosen for it on validation rows."""
    trials: int = 0
    """Settings that were tried for it."""
    settings_exist: int = 0
    """Settings that it has."""
    metrics: tuple[dict[str, float], ...]
    """Of the test rows, one for each seed."""
    rows: int
    """Of both tables; mean over the seeds."""
    row_bytes: int
    map_bytes: int
    """Of the id maps, bit-packed, with their weights; 0 where a formula does."""
    serving_map_bytes: int = 0
    """Of the id maps as `LearnedHash` serves them: int32 row numbers and the weights; 0 where a formula does."""
    map_seconds: tuple[float, ...] = ()
    train_seconds: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        """Rows and maps, as stored."""
        return self.row_bytes + self.map_bytes

    @property
    def serving_bytes(self) -> int:
        """Rows and maps, at serving."""
        return self.row_bytes + self.serving_map_bytes

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return statistics.fmean(found[metric] for found in self.metrics)

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds (n - 1); NaN for fewer than two."""
        values = [found[metric] for found in self.metrics]
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def trials_in_words(self) -> str:
        """`10`; `3 (all)` where no other settings exist."""
        if not self.trials:
            return "-"
        return f"{self.trials} (all)" if self.trials == self.settings_exist else f"{self.trials}"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All methods that fit one budget."""

    methods: tuple[HashMethodResult, ...]
    """With the full table, which is no part of the order."""
    differences: tuple[Difference, ...] = ()
    """Of all pairs of methods without the full table, by the first metric."""

    def method(self, key: str) -> HashMethodResult:
        return next(method for method in self.methods if method.key == key)

    def has(self, key: str) -> bool:
        return any(method.key == key for method in self.methods)

    def places(self) -> dict[str, str]:
        """Key -> place, `2=` for one that ties; without the full table."""
        keys = dict.fromkeys(key for pair in self.differences for key in (pair.first, pair.second))
        return places([*keys], self.differences) if keys else {}


@dataclass(frozen=True, kw_only=True)
class HashResult:
    """The whole comparison."""

    title: str
    rows: Ranking
    """At the same number of rows."""
    bytes: Ranking
    """At the same bytes, maps included."""
    byte_budget: int
    ours: str
    full: str
    """Key of the full table."""
    metrics: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a method that cannot use the budget of rows -> why."""
    too_large: dict[str, str] = field(default_factory=dict)
    """Name of a method that cannot use the budget of bytes -> why."""
    popularity: dict[str, float] = field(default_factory=dict)
    """Metrics of the items by their counts, the same for every user."""
    problems: tuple[str, ...] = ()
    """Signs that the factorization collapsed, each with its cause and its fix."""
    data: dict[str, str | int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def methods(self) -> tuple[HashMethodResult, ...]:
        """Those at the same number of rows."""
        return self.rows.methods

    def method(self, key: str) -> HashMethodResult:
        return self.rows.method(key)

    def kept(self, method: HashMethodResult) -> float:
        """Share of the full table's first metric; NaN where that is 0."""
        metric = self.metrics[0]
        full = self.method(self.full).mean(metric)
        return method.mean(metric) / full if full else math.nan

    def warnings(self) -> list[str]:
        """What the reader must know before the order of the methods."""
        found = [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        found += self.problems
        metric, full = self.metrics[0], self.method(self.full)
        if self.popularity and full.mean(metric) <= self.popularity[metric]:
            found.append(
                f"The full table ranks no better than popularity ({metric} {full.mean(metric):.4f} and "
                f"{self.popularity[metric]:.4f}): the factorization found nothing worth compressing, so the order of "
                "the methods means little."
            )
        return found

    def verdicts(self) -> list[str]:
        """Sentences on the differences that matter, ties named as ties."""
        found = []
        for ranking, where in ((self.rows, "equal rows"), (self.bytes, "equal bytes")):
            if ranking.has("learned") and ranking.has("cluster"):
                found.append(self._verdict(ranking, "learned", "cluster", where, ("Learned, one row,", "clusters")))
            others = [m for m in ranking.methods if m.key not in (self.full, self.ours, "learned")]
            if ranking.has(self.ours) and others:
                best = max(others, key=lambda method: method.mean(self.metrics[0]))
                found.append(self._verdict(ranking, self.ours, best.key, where))
        return found

    def _verdict(
        self, ranking: Ranking, ours: str, other: str, where: str, names: tuple[str, str] | None = None
    ) -> str:
        pair = difference(ranking.differences, ours, other)
        first, second = names or (ranking.method(ours).name, ranking.method(other).name)
        how = "level with" if pair.level else "ahead of" if pair.mean > 0 else "behind"
        return f"At {where}: {first} is {how} {second} ({self.metrics[0]} {_signed(pair)})."

    def save(self, path: str | Path) -> None:
        """Writes JSON; NaN and infinities become null."""
        fields = asdict(self)
        for name, ranking in (("rows", self.rows), ("bytes", self.bytes)):
            place = ranking.places()
            for saved, method in zip(fields[name]["methods"], ranking.methods, strict=True):
                saved |= {
                    "place": place.get(method.key),
                    "bytes": method.bytes,
                    "serving_bytes": method.serving_bytes,
                }
        save_json(path, fields | {"warnings": self.warnings(), "verdicts": self.verdicts()})


def _signed(pair: Difference) -> str:
    return f"{pair.mean:+.4f} ± {pair.noise:.4f}"


def format_hash_tables(result: HashResult) -> str:
    """Both rankings, one method a row, then what they say."""
    parts = [
        f"Equal rows: {result.data.get('budget of rows', 0):,}",
        _format_table(result, result.rows),
        "",
        f"Equal bytes, map included: {format_bytes(result.byte_budget)}",
        _format_table(result, result.bytes),
        "",
        *(f"{name}: {why}" for name, why in result.too_large.items()),
        *result.verdicts(),
        *(f"warning: {text}" for text in result.warnings()),
    ]
    return "\n".join(parts)


def _format_table(result: HashResult, ranking: Ranking) -> str:
    full, place = ranking.method(result.full), ranking.places()
    header = [
        "place", "", *result.metrics, "of full", "trials", "rows", "bytes stored", "of which map", "bytes at serving",
        "map made in",
    ]  # fmt: skip
    rows = [
        [
            place.get(method.key, "-"),
            ("> " if method.key == result.ours else "  ") + method.name,
            *(format_metric(method.mean(metric), method.spread(metric)) for metric in result.metrics),
            f"{100 * result.kept(method):.1f} %",
            method.trials_in_words(),
            f"{method.rows:,} ({100 * method.rows / full.rows:.3g} %)",
            f"{format_bytes(method.bytes)} ({100 * method.bytes / full.bytes:.3g} %)",
            format_bytes(method.map_bytes) if method.map_bytes else "-",
            format_bytes(method.serving_bytes),
            format_seconds(statistics.fmean(method.map_seconds)) if method.map_seconds else "-",
        ]
        for method in _ordered(result, ranking)
    ]
    if result.popularity:
        popular = [f"{result.popularity[metric]:.4f}" for metric in result.metrics]
        rows.append(["-", "  Popularity", *popular, *["-"] * 7])
    align = ("left", "left", *("left" for _ in result.metrics), *["right"] * 7)
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)


def _ordered(result: HashResult, ranking: Ranking) -> Sequence[HashMethodResult]:
    """The full table, then the methods from the best to the worst."""
    others = [method for method in ranking.methods if method.key != result.full]
    return [ranking.method(result.full), *sorted(others, key=lambda method: -method.mean(result.metrics[0]))]


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
        pair = difference(result.rows.differences, ours.key, best.key)
        tie = ", within noise" if pair.level else ""
        tiles.append((f"{pair.mean:+.4f}", f"{metric} against {best.name}, equal rows{tie}"))
    again: list[Code | Facts] = [Code(result.command)] if result.command else []
    again.append(Facts([("Versions", ", ".join(f"{name} {value}" for name, value in result.versions.items()))]))
    again.append(Code(json.dumps(result.config, indent=2, default=str), "Configuration"))
    facts = [(word, f"{value:,}" if isinstance(value, int) else value) for word, value in result.data.items()]
    too_large = [Paragraph(f"{name}: {why}") for name, why in result.too_large.items()]
    write_report(
        path,
        result.title,
        [
            Section(
                "",
                [
                    Tiles(tiles),
                    *(Paragraph(f"Warning: {text}") for text in result.warnings()),
                    *map(Paragraph, result.verdicts()),
                ],
            ),
            Section("Results at equal rows", [_table(result, result.rows)]),
            Section(
                f"Results at equal bytes: {format_bytes(result.byte_budget)}",
                [_table(result, result.bytes), *too_large],
            ),
            Section("Quality by method", [_bars(result)]),
            Section("Methods", [Facts([(m.name, _described(m)) for m in result.methods])]),
            Section("How it was measured", [*map(Paragraph, result.notes)]),
            Section("Data", [Facts(facts)]),
            Section("How to run it again", again),
        ],
    )


def _described(method: HashMethodResult) -> str:
    chosen = ", ".join(f"{word} {value}" for word, value in method.setting.items())
    if not chosen:
        return method.description
    of = f"of {method.trials} settings" + (", all that exist" if method.trials == method.settings_exist else "")
    return f"{method.description} Chosen {of}: {chosen}."


def _table(result: HashResult, ranking: Ranking) -> Table:
    full, place = ranking.method(result.full), ranking.places()
    compressed = [method for method in ranking.methods if method.key != full.key]
    best = {metric: max((m.mean(metric) for m in compressed), default=math.nan) for metric in result.metrics}
    methods = _ordered(result, ranking)
    rows = []
    for method in methods:
        cells = [
            Cell(
                format_metric(method.mean(metric), method.spread(metric)),
                strong=method is not full and method.mean(metric) == best[metric],
            )
            for metric in result.metrics
        ]
        share = f"{100 * method.bytes / full.bytes:.3g} %"
        of_map = f", map {format_bytes(method.map_bytes)}" if method.map_bytes else ""
        rows.append(
            [
                Cell(method.name),
                Cell(place.get(method.key, "-")),
                *cells,
                Cell(method.trials_in_words()),
                Cell(f"{method.rows:,}"),
                Cell(format_bytes(method.bytes), note=f"{share}{of_map}"),
                Cell(format_bytes(method.serving_bytes)),
            ]
        )
    if result.popularity:
        popular = [Cell(f"{result.popularity[metric]:.4f}") for metric in result.metrics]
        rows.append([Cell("Popularity"), Cell("-"), *popular, *[Cell("-")] * 4])
    keys = [method.key for method in methods]
    return Table(
        header=("Method", "Place", *result.metrics, "Trials", "Rows", "Bytes stored", "Bytes at serving"),
        rows=rows,
        marked=keys.index(result.ours) if result.ours in keys else None,
        caption=("One seed" if len(full.metrics) == 1 else f"Mean ± standard deviation over {len(full.metrics)} seeds")
        + "; float32 rows; bytes with the map included; = marks places shared within noise.",
    )


def _bars(result: HashResult) -> Plot:
    metric = result.metrics[0]
    full = result.method(result.full)
    methods = sorted((m for m in result.methods if m is not full), key=lambda method: method.mean(metric))
    with rc_context(PLOT_STYLE):
        figure, axes = chart(metric, "")
        for place, method in enumerate(methods):
            for ranking, shift, strong in ((result.rows, 0.2, True), (result.bytes, -0.2, False)):
                if not ranking.has(method.key):
                    continue
                found = ranking.method(method.key)
                spread = found.spread(metric)
                axes.barh(
                    place + shift,
                    found.mean(metric),
                    height=0.38,
                    xerr=None if math.isnan(spread) else spread,
                    color=SERIES[1] if method.key == result.ours else SERIES[0],
                    alpha=1.0 if strong else 0.55,
                    error_kw={"ecolor": MUTED},
                )
        axes.set_yticks(range(len(methods)), [method.name for method in methods])
        axes.axvline(full.mean(metric), color=MUTED, linewidth=1.2, linestyle="--", label="Full table")
        axes.grid(axis="y", visible=False)
        plot_legend(figure, axes)
        return Plot(
            plot_svg(figure, "methods"),
            f"{metric} at the same number of rows (full color) and at the same bytes (pale); dashed: a row for each "
            "id. Bars: standard deviation over seeds.",
            "Quality by method",
        )
