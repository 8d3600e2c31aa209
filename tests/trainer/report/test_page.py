"""The frame of a report page."""

import re

import pytest

from recpress.data.errors import InputError
from recpress.trainer.report.charts import Bars, Chart, Lines, Series
from recpress.trainer.report.page import Cell, Report, Section, Table
from tests.trainer.report.html import Page

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def test_every_part_of_a_report_is_on_the_page_escaped_and_in_order(tmp_path):
    panel = Lines(x_label="x", y_label="y", series=[Series(label=HOSTILE, x=[1, 2], y=[3, 4])])
    bars = Bars(x_label="x", labels=["a", HOSTILE], groups=[("b", [1.0, None])], level=("at", 0.5))
    charts = [Chart(title=HOSTILE, caption="1", panels=[panel, panel]), Chart(title="2", caption="2", panels=[bars])]
    rows = [["plain", Cell("12", "note", True)]]
    table = Table(header=["name", "count"], rows=rows, highlighted=0, caption="Below it.")
    Report(
        title=HOSTILE,
        warnings=["careful"],
        summary=["In short."],
        tiles=[("0.5", "HR")],
        sections=[
            Section(
                title="S",
                charts=charts,
                table=table,
                texts=["A sentence."],
                facts=[("Term", "fact")],
                details=("Unfold", "code"),
            )
        ],
        notes=["measured so"],
        data={"users": 12345},
        command=f"recpress {HOSTILE}",
        versions={"torch": "2"},
        config={"a": {"b": HOSTILE}},
    ).write(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert page.text.count(HOSTILE) >= 5
    order = [
        "careful", "In short.", "Below it.", "plain", "A sentence.", "Term", "Unfold", "How it was measured", "12,345",
        "How to run it again", "torch 2", "Configuration",
    ]  # fmt: skip
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "#0101" not in (tmp_path / "page.html").read_text()


def test_empty_parts_have_no_heading(tmp_path):
    Report(title="T").write(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "h2" not in page.tags
    assert not re.search(r"<(table|figure|dl|details)", (tmp_path / "page.html").read_text())


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        Report(title="T").write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
