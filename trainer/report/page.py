"""Report pages: one HTML file each, with its style and its plots inside, and nothing fetched from anywhere.

Everything that is given as text is escaped. Pages follow the reader's light or dark setting; print is light.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from recpress.trainer.report.results import write_whole

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{place:02x}" for place in range(10))
"""Colours to plot with. They stand for colours of the style sheet, which are others in light and in dark."""

_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
_COLOURS |= {colour: f"var(--series-{place})" for place, colour in enumerate(SERIES)}

PLOT_STYLE = {
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


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Alert:
    """What fell short: a paragraph that stands out."""

    text: str


@dataclass(frozen=True)
class Tiles:
    """Key figures side by side: (figure, what it is)."""

    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    """Smaller, below the text."""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table; on a narrow screen each row becomes a card."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: int | None = None
    """Row that the page is about."""
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    svg: Markup
    """From `plot_svg`."""
    caption: str
    alt: str


@dataclass(frozen=True)
class Facts:
    """Words and their explanations or values."""

    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    text: str
    summary: str = ""
    """Where given, the text is folded behind this line."""


@dataclass(frozen=True)
class Section:
    title: str
    """No heading where empty."""
    blocks: Sequence[Paragraph | Alert | Tiles | Table | Plot | Facts | Code]


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page as one file, whole or not at all. Raises InputError where it cannot be written."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__
    page = environment.from_string(PAGE).render(title=title, sections=sections, style=Markup(STYLE))
    write_whole(path, page)


def plot_svg(figure: Figure, name: str) -> Markup:
    """A figure as inline SVG in the colours of the page; its ids begin with `name`, unique on the page."""
    with rc_context({**PLOT_STYLE, "svg.hashsalt": name}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font: \1px var(--font)", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return Markup(text)


STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --ink: #1b2430; --muted: #5d6b7c; --line: #dfe4ea; --paper: #ffffff; --card: #f6f8fa;
  --mark: #eaf2fb; --accent: #1f6fb5; --alert: #c2571a;
  --series-0: #6b7785; --series-1: #1f6fb5; --series-2: #c2571a; --series-3: #d99a00; --series-4: #1a8f6a;
  --series-5: #b8327f; --series-6: #6c52b8; --series-7: #3aa0c9; --series-8: #8a6d3b; --series-9: #40474f;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6ebf1; --muted: #98a5b3; --line: #303a46; --paper: #12171d; --card: #1a2129;
  --mark: #17293b; --accent: #6db3ee; --alert: #f0905a;
  --series-0: #9aa6b2; --series-1: #6db3ee; --series-2: #f0905a; --series-3: #f2c14e; --series-4: #4fcfa4;
  --series-5: #ef7fbd; --series-6: #ab97ee; --series-7: #7fd3f0; --series-8: #cdb07a; --series-9: #c5ccd3;
} }
@media print { :root {
  color-scheme: light;
  --ink: #000000; --muted: #444444; --line: #cccccc; --paper: #ffffff; --card: #f6f8fa; --mark: #eaf2fb;
  --accent: #1f6fb5; --alert: #c2571a;
  --series-0: #6b7785; --series-1: #1f6fb5; --series-2: #c2571a; --series-3: #d99a00; --series-4: #1a8f6a;
  --series-5: #b8327f; --series-6: #6c52b8; --series-7: #3aa0c9; --series-8: #8a6d3b; --series-9: #40474f;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 0.75rem; }
p { max-width: 46rem; margin: 0.6rem 0; overflow-wrap: anywhere; }
.warning { background: var(--card); border-left: 4px solid var(--alert); padding: 0.6rem 0.9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.75rem;
         margin: 1.5rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.9rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; margin-top: 0.25rem; color: var(--muted); font-size: 0.88rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; }
caption, figcaption { color: var(--muted); font-size: 0.88rem; padding-top: 0.6rem; max-width: 46rem; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: 0.86rem; white-space: nowrap; }
th, td { padding: 0.5rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9.5rem; }
td small { display: block; white-space: pre-line; color: var(--muted); font-size: 0.8rem; }
td b { color: var(--accent); }
table.dense { font-size: 0.8rem; margin-top: 1rem; }
.dense th { font-size: 0.76rem; vertical-align: bottom; }
.dense th, .dense td { padding: 0.3rem 0.35rem; white-space: normal; }
tr.marked td { background: var(--mark); }
tr.marked td:first-child { font-weight: 600; box-shadow: inset 3px 0 var(--accent); }
figure { margin: 1rem 0 0; max-width: 46rem; }
figure svg { display: block; width: 100%; height: auto; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: 0.5rem 1.5rem; }
dt { font-weight: 600; max-width: 18rem; }
dd { margin: 0; overflow-wrap: anywhere; max-width: 46rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.8rem 1rem;
      font: 0.84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 46rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile b { font-size: 1.25rem; }
  thead { display: none; }
  table { display: flex; flex-direction: column; }
  caption { order: 1; }
  tbody, tr { display: block; }
  tr { border: 1px solid var(--line); border-radius: 0.5rem; margin: 0 0 0.75rem; padding: 0.35rem 0; }
  tr.marked { background: var(--mark); border-color: var(--accent); }
  tr.marked td:first-child { box-shadow: none; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0.2rem 0.9rem;
       white-space: normal; }
  td:first-child { font-weight: 600; }
  td:not(:first-child)::before { content: attr(data-label); color: var(--muted); }
  dl { grid-template-columns: 1fr; gap: 0.1rem; }
  dt { max-width: none; }
  dd { margin-bottom: 0.7rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  figure, tr, .tile { break-inside: avoid; }
  h2 { break-after: avoid; }
  .tile, pre, tr.marked td { print-color-adjust: exact; }
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="recpress">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
{% if section.title %}
<h2>{{ section.title }}</h2>
{% endif %}
{% for block in section.blocks %}
{% set kind = block|kind %}
{% if kind == "Paragraph" %}
<p>{{ block.text }}</p>
{% elif kind == "Alert" %}
<p class="warning"><b>Warning.</b> {{ block.text }}</p>
{% elif kind == "Tiles" %}
<div class="tiles">
{% for figure, what in block.tiles %}
<div class="tile"><b>{{ figure }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
{% elif kind == "Table" %}
<table{% if block.header|length > 7 %} class="dense"{% endif %}>
{% if block.caption %}
<caption>{{ block.caption }}</caption>
{% endif %}
<thead><tr>{% for name in block.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr{% if loop.index0 == block.marked %} class="marked"{% endif %}>
{% for cell in row %}
<td data-label="{{ block.header[loop.index0] }}"><div>
{%- if cell.strong %}<b>{{ cell.text }}</b>{% else %}{{ cell.text }}{% endif %}
{%- if cell.note %}<small>{{ cell.note }}</small>{% endif -%}
</div></td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
{% elif kind == "Plot" %}
<figure role="img" aria-label="{{ block.alt }}">
{{ block.svg }}
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif kind == "Facts" %}
<dl>
{% for word, fact in block.facts %}
<dt>{{ word }}</dt><dd>{{ fact }}</dd>
{% endfor %}
</dl>
{% elif kind == "Code" %}
{% if block.summary %}
<details><summary>{{ block.summary }}</summary><pre>{{ block.text }}</pre></details>
{% else %}
<pre>{{ block.text }}</pre>
{% endif %}
{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
