"""Charts as inline SVG, in the colors of the page's style sheet."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, MUTED, GRID = "#010101", "#010102", "#010103"
PALETTE = tuple(f"#0102{index:02x}" for index in range(10))
"""Placeholders: `Chart.svg` replaces each with a variable of the style sheet, whose value depends on light or dark."""
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
_VARIABLES |= {color: f"var(--series-{index})" for index, color in enumerate(PALETTE)}
_MARKERS = "osD^vP<>hd"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    x_range: tuple[float, float] | None = None
    """Of a single point: smallest and largest x."""
    y_error: Sequence[float] | None = None
    color: int = 0
    """Index of color and marker."""
    size: float = 5.0
    """Of the markers, points."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Axes with lines."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()
    """Dashed horizontal lines: (label, y)."""
    log_x: bool = False
    x_ticks: Sequence[float] | None = None
    """All ticks; if not given, 1, 2 and 5 times powers of ten on a logarithmic axis, integers on a linear one."""
    format_x: Callable[[float], str] = "{:g}".format
    format_y: Callable[[float], str] | None = None
    y_from_zero: bool = False

    def draw(self, axes: Axes) -> None:
        for line in self.series:
            low, high = line.x_range or (0.0, 0.0)
            axes.errorbar(
                line.x,
                line.y,
                xerr=[[line.x[0] - low], [high - line.x[0]]] if line.x_range else None,
                yerr=None if line.y_error is None or any(map(math.isnan, line.y_error)) else line.y_error,
                color=PALETTE[line.color % len(PALETTE)],
                marker=_MARKERS[line.color % len(_MARKERS)],
                markersize=line.size,
                elinewidth=1.4,
                label=line.label,
            )
        for label, level in self.levels:
            axes.axhline(level, color=MUTED, linewidth=1.2, linestyle="--", label=label)
        axes.set_xlabel(f"{self.x_label} (log scale)" if self.log_x and self.x_ticks is None else self.x_label)
        axes.set_ylabel(self.y_label)
        if self.y_from_zero:
            axes.set_ylim(0, 1.06 * axes.dataLim.y1)
        if self.format_y is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: self.format_y(value)))  # type: ignore[misc]
        self._ticks(axes)

    def _ticks(self, axes: Axes) -> None:
        ticks = self.x_ticks
        if self.log_x:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            low, high = axes.get_xlim()
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            digits = (1, 2, 5) if high < 1000 * low else (1,)
            ticks = ticks or [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif len(ticks) > 1:
            axes.set_xticks(ticks, [self.format_x(tick) for tick in ticks])
        axes.minorticks_off()


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Axes with horizontal bars."""

    x_label: str
    labels: Sequence[str]
    """Of the rows, from top to bottom."""
    groups: Sequence[tuple[str, Sequence[float | None]]]
    """(label, a value per row; None: no bar). The second and later groups are paler."""
    errors: Sequence[Sequence[float | None]] = ()
    """Like the values of `groups`; NaN and None: no error bar."""
    highlighted: str | None = None
    """Label of the row in another color."""
    level: tuple[str, float] | None = None
    """A dashed vertical line: (label, x)."""
    format_x: Callable[[float], str] | None = None
    value_labels: Sequence[str] = ()
    """Text at the end of each bar of the first group."""

    def draw(self, axes: Axes) -> None:
        height = 0.76 / len(self.groups)
        for number, (label, values) in enumerate(self.groups):
            errors = self.errors[number] if self.errors else itertools.repeat(None)
            shift = height * (number - (len(self.groups) - 1) / 2)
            rows = [
                (row + shift, value, math.nan if error is None else error, name == self.highlighted)
                for row, (name, value, error) in enumerate(zip(self.labels, values, errors, strict=False))
                if value is not None
            ]
            drawn = axes.barh(
                [row for row, *_ in rows],
                [value for _, value, *_ in rows],
                height=0.95 * height,
                xerr=[error for *_, error, _ in rows] if self.errors else None,
                color=[PALETTE[0 if self.highlighted and not strong else 1] for *_, strong in rows],
                alpha=0.55 if number else 1.0,
                error_kw={"ecolor": MUTED},
                label=label,
            )
            if self.value_labels and not number:
                axes.bar_label(drawn, self.value_labels, padding=3, fontsize=8)
                axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.set_xlabel(self.x_label)
        axes.set_yticks(range(len(self.labels)), self.labels)
        if self.level:
            axes.axvline(self.level[1], color=MUTED, linewidth=1.2, linestyle="--", label=self.level[0])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        if self.format_x is not None:
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: self.format_x(value)))  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Axes side by side, with one legend below."""

    title: str
    caption: str
    panels: Sequence[Lines | Bars]
    size: tuple[float, float] = (6.4, 3.5)
    """Width and height in inches."""
    legend: bool = True

    def svg(self, name: str) -> Markup:
        """The chart in the colors of the page; the ids of its elements begin with `name`, unique on the page."""
        with rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = Figure(figsize=self.size, layout="constrained")
            bars = isinstance(self.panels[0], Bars)
            all_axes = figure.subplots(1, len(self.panels), sharey=bars, squeeze=False)[0]
            for axes, panel in zip(all_axes, self.panels, strict=True):
                panel.draw(axes)
            if bars:
                all_axes[0].invert_yaxis()
            if self.legend:
                _draw_legend(figure, all_axes)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
        text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px var(--font)", text)
        for color, variable in _VARIABLES.items():
            text = text.replace(color, variable)
        return Markup(text)


def _draw_legend(figure: Figure, all_axes: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, 1 + len(all_axes)), fontsize=8.5,
        handlelength=1.6,
    )  # fmt: skip
