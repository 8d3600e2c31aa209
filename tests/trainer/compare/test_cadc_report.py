"""The report page of `compare cadc`."""

import dataclasses
import re

import pytest

from recpress.trainer.compare.cadc_report import cadc_report
from tests.trainer.compare.results import HOSTILE, cadc_result
from tests.trainer.report.html import Page


@pytest.fixture
def result():
    return cadc_result()


def test_page_is_whole_and_fetches_nothing(result, tmp_path):
    path = tmp_path / "page.html"
    cadc_report(result).write(path)
    page = Page(path)
    assert page.tags.count("svg") == 3
    assert page.tags.count("h1") == 1
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    style = path.read_text(encoding="utf-8")
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_page_shows_everything_and_escapes_it(result, tmp_path):
    cadc_report(result).write(tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.text.count(HOSTILE) >= 8  # title twice, warning, note, method, data, versions, command
    for text in ("0.4600 ± 0.0141", "factorize 6.0 s\n+ train 4.0 s", "10x", "1.5 MB", "6,040", "+0.0150", "+0.0550"):
        assert text in page.text


def test_charts_take_the_colours_of_the_page(result, tmp_path):
    cadc_report(result).write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "#0101" not in text
    assert "#0102" not in text
    drawn = text[text.index("<svg") :]
    place = [method.key for method in result.methods].index("cadc")
    assert f"var(--series-{place})" in drawn
    assert not re.search(r"(fill|stroke): ?#(?!000000)", drawn)


def test_charts_without_points_are_not_drawn(result, tmp_path):
    methods = tuple(
        dataclasses.replace(m, curve=(), seeds=tuple(dataclasses.replace(s, seconds={}) for s in m.seeds))
        for m in result.methods
    )
    cadc_report(dataclasses.replace(result, methods=methods, sweeps=())).write(tmp_path / "page.html")
    assert "svg" not in Page(tmp_path / "page.html").tags
