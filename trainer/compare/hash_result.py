"""What `compare hash` found: plain data, tables for the terminal and the report page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.compare.result import Result, seeds_caption
from recpress.trainer.compare.ties import Difference, difference, places
from recpress.trainer.report.charts import Bars, Chart
from recpress.trainer.report.numbers import format_bytes, format_metric, format_seconds, share
from recpress.trainer.report.page import Cell, Report, Section, Table

FULL = "full"
"""Key of the full table."""
SMALLER = ("LogLoss", "NE")
"""Metrics of which the smaller is better."""


@dataclass(frozen=True, kw_only=True)
class HashMethodResult:
    """One method, all seeds."""

    key: str
    name: str
    description: str
    setting: dict[str, Any]
    """What was chosen for it on validation examples."""
    trials: int = 0
    """Settings that were tried."""
    settings_exist: int = 0
    """Settings that the method has."""
    metrics: tuple[dict[str, float], ...]
    """Of the test examples, one for each seed."""
    rows: int
    """Embedding rows of all tables; mean over the seeds."""
    row_bytes: int
    map_bytes: int
    """Of the id maps or whatever else finds rows, as stored; 0 for a formula."""
    serving_map_bytes: int = 0
    """The same with int32 row numbers, as `LearnedHash` serves maps; 0 for a formula."""
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

    def formatted(self, metric: str) -> str:
        """`0.7201 ± 0.0012`."""
        return format_metric(self.mean(metric), self.spread(metric))

    def trials_in_words(self) -> str:
        """`10`; `3 (all)` if no other settings exist."""
        if not self.trials:
            return "-"
        return f"{self.trials} (all)" if self.trials == self.settings_exist else f"{self.trials}"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All methods that fit one budget."""

    methods: tuple[HashMethodResult, ...]
    """With the full table, which is not ranked."""
    differences: tuple[Difference, ...] = ()
    """Of all pairs of methods, by the first metric."""

    def method(self, key: str) -> HashMethodResult:
        return next(method for method in self.methods if method.key == key)

    def has(self, key: str) -> bool:
        return any(method.key == key for method in self.methods)

    def places(self) -> dict[str, str]:
        """Key -> place, `2=` for one that ties; without the full table."""
        keys = dict.fromkeys(key for pair in self.differences for key in (pair.first, pair.second) if key != FULL)
        return places([*keys], self.differences)

    def level_with_full(self, key: str) -> bool:
        """Whether a method loses nothing to the full table but noise."""
        try:
            return difference(self.differences, key, FULL).level
        except KeyError:
            return False


@dataclass(frozen=True, kw_only=True)
class HashResult(Result):
    """The whole comparison. Methods are ranked by the first of `metrics`."""

    rows: Ranking | None
    """At the same number of embedding rows; None if that was not compared."""
    bytes: Ranking | None
    """At the same bytes, maps included; None if that was not compared."""
    byte_budget: int
    ours: str
    full: str
    """Key of the full table."""
    too_large: dict[str, str] = field(default_factory=dict)
    """Name of a method that cannot use the budget of bytes -> why."""
    popularity: dict[str, float] = field(default_factory=dict)
    """Metrics of the items by their counts, the same for every user."""

    @property
    def rankings(self) -> dict[str, Ranking]:
        """`equal rows`, `equal bytes`: those that were compared, at least one."""
        both = {"equal rows": self.rows, "equal bytes": self.bytes}
        return {name: ranking for name, ranking in both.items() if ranking is not None}

    @property
    def main(self) -> Ranking:
        """At equal rows, if that was compared."""
        return next(iter(self.rankings.values()))

    @property
    def methods(self) -> tuple[HashMethodResult, ...]:
        """Those of the main ranking."""
        return self.main.methods

    def method(self, key: str) -> HashMethodResult:
        return self.main.method(key)

    def of_full(self, method: HashMethodResult) -> float:
        """Share of the full table's first metric; NaN if that is 0."""
        metric = self.metrics[0]
        full = self.method(self.full).mean(metric)
        return method.mean(metric) / full if full else math.nan

    def no_signal(self) -> str | None:
        """A warning if the full table is not better than popularity."""
        metric, full = self.metrics[0], self.method(self.full)
        if not self.popularity or full.mean(metric) > self.popularity[metric]:
            return None
        return (
            f"The full table ranks no better than popularity ({metric} {full.mean(metric):.4f} and "
            f"{self.popularity[metric]:.4f}): the factorization found nothing worth compressing, so the order of the "
            "methods means little."
        )

    def verdicts(self) -> list[str]:
        """Sentences on the differences that matter, ties named as ties."""
        found = []
        for budget, ranking in self.rankings.items():
            if ranking.has("learned") and ranking.has("cluster"):
                found.append(self._verdict(ranking, "learned", "cluster", budget, ("Learned, one row,", "clusters")))
            others = [
                m for m in ranking.methods if m.key not in (self.full, self.ours) and not m.key.startswith("learned")
            ]
            if ranking.has(self.ours) and others:
                best = max(others, key=lambda method: method.mean(self.metrics[0]))
                found.append(self._verdict(ranking, self.ours, best.key, budget))
        return found

    def _verdict(
        self, ranking: Ranking, ours: str, other: str, budget: str, names: tuple[str, str] | None = None
    ) -> str:
        pair = difference(ranking.differences, ours, other)
        first, second = names or (ranking.method(ours).name, ranking.method(other).name)
        how = "level with" if pair.level else "ahead of" if pair.mean > 0 else "behind"
        return f"At {budget}: {first} is {how} {second} ({self.metrics[0]} {pair.in_words()})."

    def ordered(self, ranking: Ranking) -> Sequence[HashMethodResult]:
        """The full table, then the methods from the best to the worst."""
        others = [method for method in ranking.methods if method.key != self.full]
        return [ranking.method(self.full), *sorted(others, key=lambda method: -method.mean(self.metrics[0]))]

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        for name, ranking in self.rankings.items():
            place = ranking.places()
            for saved, method in zip(fields[name.removeprefix("equal ")]["methods"], ranking.methods, strict=True):
                saved |= {
                    "place": place.get(method.key),
                    "level_with_full": ranking.level_with_full(method.key),
                    "bytes": method.bytes,
                    "serving_bytes": method.serving_bytes,
                }
        return fields | {"verdicts": self.verdicts()}


def format_hash_tables(result: HashResult) -> str:
    """Both rankings, one method per row, then the verdicts and warnings."""
    parts = [
        *(
            [f"Equal rows: {result.data.get('budget of rows', 0):,}", _format_table(result, result.rows), ""]
            if result.rows is not None
            else []
        ),
        *(
            [f"Equal bytes, map included: {format_bytes(result.byte_budget)}", _format_table(result, result.bytes), ""]
            if result.bytes is not None
            else []
        ),
        *(f"{name}: {why}" for name, why in result.too_large.items()),
        *result.verdicts(),
        *(f"warning: {text}" for text in result.warnings),
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
            *map(method.formatted, result.metrics),
            f"{100 * result.of_full(method):.1f} %{' =' if ranking.level_with_full(method.key) else ''}",
            method.trials_in_words(),
            f"{method.rows:,} ({share(method.rows, full.rows)})",
            f"{format_bytes(method.bytes)} ({share(method.bytes, full.bytes)})",
            format_bytes(method.map_bytes) if method.map_bytes else "-",
            format_bytes(method.serving_bytes),
            format_seconds(statistics.fmean(method.map_seconds)) if method.map_seconds else "-",
        ]
        for method in result.ordered(ranking)
    ]
    if result.popularity:
        popular = [f"{result.popularity[metric]:.4f}" for metric in result.metrics]
        rows.append(["-", "  Popularity", *popular, *["-"] * 7])
    align = ("left", "left", *("left" for _ in result.metrics), *["right"] * 7)
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True, preserve_whitespace=True)


def hash_report(result: HashResult) -> Report:
    """The report page."""
    ours, full, metric = result.method(result.ours), result.method(result.full), result.metrics[0]
    others = [m for m in result.methods if m.key not in (ours.key, full.key) and not m.key.startswith("learned")]
    tiles = [
        (f"{ours.mean(metric):.4f}", f"{metric} of {ours.name}"),
        (f"{100 * result.of_full(ours):.1f} %", f"of the full table's {metric}"),
        (f"{100 * ours.bytes / full.bytes:.1f} %", "of the full table's bytes, map included"),
    ]
    if others:
        best = max(others, key=lambda method: method.mean(metric))
        pair = difference(result.main.differences, ours.key, best.key)
        tie = ", within noise" if pair.level else ""
        tiles.append((f"{pair.mean:+.4f}", f"{metric} against {best.name}, {next(iter(result.rankings))}{tie}"))
    return result.to_report(
        tiles,
        [
            *(
                [Section(title="Results at equal rows", table=_table(result, result.rows))]
                if result.rows is not None
                else []
            ),
            *(
                [
                    Section(
                        title=f"Results at equal bytes: {format_bytes(result.byte_budget)}",
                        table=_table(result, result.bytes),
                        texts=[f"{name}: {why}" for name, why in result.too_large.items()],
                    )
                ]
                if result.bytes is not None
                else []
            ),
            Section(title="Quality by method", charts=[_chart(result)]),
            Section(title="Methods", facts=[(m.name, _described(m)) for m in result.methods]),
        ],
        summary=result.verdicts(),
    )


def _described(method: HashMethodResult) -> str:
    chosen = ", ".join(f"{word} {value}" for word, value in method.setting.items())
    if not chosen:
        return method.description
    of = f"of {method.trials} settings" + (", all that exist" if method.trials == method.settings_exist else "")
    return f"{method.description} Chosen {of}: {chosen}."


def _table(result: HashResult, ranking: Ranking) -> Table:
    full, place = ranking.method(result.full), ranking.places()
    methods = result.ordered(ranking)
    best = {
        metric: (min if metric in SMALLER else max)((m.mean(metric) for m in methods[1:]), default=math.nan)
        for metric in result.metrics
    }
    rows: list[list[Cell | str]] = []
    for method in methods:
        of_map = f", map {format_bytes(method.map_bytes)}" if method.map_bytes else ""
        rows.append(
            [
                method.name,
                place.get(method.key, "-"),
                *(
                    Cell(method.formatted(m), strong=method.key != full.key and method.mean(m) == best[m])
                    for m in result.metrics
                ),
                method.trials_in_words(),
                f"{method.rows:,}",
                Cell(format_bytes(method.bytes), note=share(method.bytes, full.bytes) + of_map),
                format_bytes(method.serving_bytes),
            ]
        )
    if result.popularity:
        popular = [f"{result.popularity[metric]:.4f}" for metric in result.metrics]
        rows.append(["Popularity", "-", *popular, *["-"] * 4])
    keys = [method.key for method in methods]
    return Table(
        header=("Method", "Place", *result.metrics, "Trials", "Rows", "Bytes stored", "Bytes at serving"),
        rows=rows,
        highlighted=keys.index(result.ours) if result.ours in keys else None,
        caption=seeds_caption(len(full.metrics))
        + "Embedding rows in float32; bytes include the map; = marks places shared within noise.",
    )


def _chart(result: HashResult) -> Chart:
    metric, full = result.metrics[0], result.method(result.full)
    methods = [m for m in result.ordered(result.main) if m is not full]
    rankings = result.rankings

    def values(ranking: Ranking, of: str) -> list[float | None]:
        return [getattr(ranking.method(m.key), of)(metric) if ranking.has(m.key) else None for m in methods]

    panel = Bars(
        x_label=metric,
        labels=[method.name for method in methods],
        groups=[(name, values(ranking, "mean")) for name, ranking in rankings.items()],
        errors=[values(ranking, "spread") for ranking in rankings.values()],
        highlighted=result.method(result.ours).name,
        level=("Full table", full.mean(metric)),
    )
    budgets = next(iter(rankings)) if len(rankings) == 1 else "equal rows (full color) and at equal bytes (pale)"
    return Chart(
        title="Quality by method",
        caption=f"{metric} at {budgets}; dashed: one row per id. Bars: standard deviation over seeds.",
        panels=[panel],
    )
