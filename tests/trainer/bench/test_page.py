"""The page of results."""

import json
import re

import pytest

from recpress.benchmarks.common import bars, lines, publish
from recpress.trainer.bench.config import BenchPageConfig
from recpress.trainer.bench.page import shown
from recpress.trainer.bench.stages import page
from recpress.trainer.cli import main

HOSTILE = "<script>alert('x')</script>"


def result(tmp_path, capsys, **values):
    out = tmp_path / "results" / "made.json"
    rows = [
        {"loop": loop, "rows": rows, "batch": 8, "rows/s": speed * rows, "peak MB": 1234.5, "ok": True}
        for loop, speed in (("ours", 2.0), (HOSTILE, 1.0))
        for rows in (1000, 2000, 16_000)
    ] + [{"loop": "peer", "note": "not installed"}]
    publish("How fast?", rows, out=out, settings={"steps": 3}, **values)
    return out, capsys.readouterr().out


def test_a_result_is_a_table_and_a_page_of_its_rows(tmp_path, capsys):
    at = {"rows": 1000, "batch": 8}
    plots = [
        lines(["rows", "batch"], ["rows/s", "peak MB"], ["loop"], at=at, title="Speed"),
        bars(["rows/s"], ["loop", "rows"], title="All", only={"loop": ["ours"]}),
    ]
    out, printed = result(tmp_path, capsys, plots=plots)
    assert "How fast?" in printed
    assert "not installed" in printed
    page(BenchPageConfig(folder=str(out.parent)))
    text = (out.parent / "report.html").read_text()
    assert "<script" not in text
    assert text.count("<figure") == 2  # one value of batch is no line
    assert "Speed: rows/s and peak MB against rows; batch 8." in text
    assert "ours, rows 16,000" in text
    for cell in ("32,000", "1,234", "not installed", "yes"):
        assert f">{cell}<" in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert main(["bench", "page", str(out.parent), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == text


def test_without_plots_the_page_draws_a_measure(tmp_path, capsys):
    out, _ = result(tmp_path, capsys)
    page(BenchPageConfig(folder=str(out.parent)))
    assert "rows/s, by loop." in (out.parent / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a result of `recpress bench run`"),
        ("[1]", "not a result"),
        (json.dumps({"format": 1, "rows": []}), "it has no 'benchmark'"),
        (json.dumps({"format": 99}), "format 99, expected 1"),
    ],
)
def test_a_file_that_is_no_result_is_named(text, message, tmp_path, capsys):
    (tmp_path / "odd.json").write_text(text)
    assert main(["bench", "page", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/odd.json: " in error
    assert message in error


def test_an_empty_folder_has_no_page(tmp_path, capsys):
    assert main(["bench", "page", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (None, "\N{EN DASH}"),
        (float("nan"), "\N{EN DASH}"),
        (True, "yes"),
    ],
)
def test_values_of_a_table(value, text):
    assert shown(value) == text
