"""A report: one HTML file with its style and charts inside, which fetches nothing.

A comparison only builds a `Report`; the page's form is in `page.html.j2`. All text is escaped. A page follows the
reader's light or dark setting and prints in light colors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from recpress.data.dataset import object_store
from recpress.trainer.report.charts import Chart

_TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    """Smaller text below."""
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """On a narrow screen each row becomes a card."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    highlighted: int | None = None
    """Row that the page is about."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what follows it, in this order."""

    title: str
    charts: Sequence[Chart] = ()
    table: Table | None = None
    texts: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Terms and their explanations or values."""
    details: tuple[str, str] | None = None
    """(summary, preformatted text that unfolds)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    title: str
    warnings: Sequence[str] = ()
    summary: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    """Key figures: (figure, what it is)."""
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    """How it was measured, a paragraph each."""
    data: Mapping[str, str | int | float] = field(default_factory=dict)
    """Facts of the log."""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """All settings, as JSON values."""

    def write(self, path: str | Path) -> None:
        """Write the page atomically. Raises InputError if it cannot be written."""
        environment = Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_with_thousands_separators
        )
        environment.filters["json"] = lambda value: json.dumps(value, indent=2, default=str, ensure_ascii=False)
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        object_store.write_bytes(path, template.render(report=self).encode())


def _with_thousands_separators(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
