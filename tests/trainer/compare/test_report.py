import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from recpress.data.errors import InputError
from recpress.trainer.compare.report import write_compare_report
from recpress.trainer.report.page import SERIES, Plot, Section, plot_svg, write_report
from recpress.trainer.report.results import (
    CompareResult,
    CurvePoint,
    MethodResult,
    SeedResult,
    SweepPoint,
    format_seconds,
    format_table,
    load_result,
)

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def method(key, values, seconds, rows=None, curve=(), description="What it does."):
    seeds = tuple(
        SeedResult(seed=n, metrics={"HR@10": v + 0.2, "NDCG@10": v}, seconds=seconds, curve=curve)
        for n, v in enumerate(values)
    )
    return MethodResult(key=key, name=f"{key} 10 %", description=description, seeds=seeds, rows=rows)


@pytest.fixture
def result():
    curve = tuple(CurvePoint(seconds=n, epoch=n, metrics={"NDCG@10": 0.3 + 0.01 * n}) for n in range(4))
    return CompareResult(
        title=HOSTILE,
        methods=(
            method("popularity", [0.25], {}),
            method("mf", [0.44, 0.45], {"factorize": 6.0}),
            method("random", [0.40, 0.41], {"train": 120.0}, 1000, curve),
            method("cadc", [0.45, 0.47], {"factorize": 6.0, "train": 4.0}, 100, curve, HOSTILE),
        ),
        ours="cadc",
        reference="random",
        factorization="mf",
        total_rows=1000,
        sweeps=tuple(SweepPoint(sweep=n, objective=100.0 / n, seconds=n) for n in (1, 2, 3)),
        data={"Log": HOSTILE, "Users": 6040},
        notes=(HOSTILE,),
        config={"name": HOSTILE},
        versions={"torch": HOSTILE},
        command=f"recpress compare cadc --data {HOSTILE}",
    )


def test_means_spreads_and_speedups(result):
    ours = result.method("cadc")
    assert ours.mean("NDCG@10") == pytest.approx(0.46)
    assert ours.spread("NDCG@10") == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(result.method("popularity").spread("NDCG@10"))
    assert math.isnan(ours.mean("AUC"))
    assert ours.seconds == 10
    assert ours.parts == {"factorize": 6, "train": 4}
    assert result.speedup(ours) == 12
    assert math.isnan(result.speedup(result.method("popularity")))


def test_table_for_the_terminal(result):
    lines = format_table(result).splitlines()
    ours = next(line for line in lines if line.startswith("> cadc"))
    assert re.split(r"\s{2,}", ours) == [
        "> cadc 10 %",
        "0.6600 ± 0.0141",
        "0.4600 ± 0.0141",
        "100 (10 %)",
        "10 s",
        "12x",
        "factorize 6.0 s + train 4.0 s",
    ]
    assert len(lines) == 2 + len(result.methods)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "-"),
        (0.414, "0.41 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (599, "599 s"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_json_round_trip(result, tmp_path):
    result.save(tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_nan_becomes_null_and_comes_back(result, tmp_path):
    broken = dataclasses.replace(result.methods[0], seeds=(SeedResult(seed=0, metrics={"HR@10": math.nan}),))
    result = dataclasses.replace(result, methods=(broken, *result.methods[1:]))
    result.save(tmp_path / "result.json")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert math.isnan(load_result(tmp_path / "result.json").methods[0].seeds[0].metrics["HR@10"])
    write_compare_report(tmp_path / "page.html", result)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "methods": 3}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_result(path)


def test_an_unknown_key_is_refused(result, tmp_path):
    path = tmp_path / "result.json"
    result.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))
    with pytest.raises(InputError, match="surprise"):
        load_result(path)


class Page(HTMLParser):
    """Tags, ids and text of a page; fails where tags do not close in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.links, self.text, self.open = [], [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                self.links.append(value)
            assert not name.startswith("on")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_fetches_nothing(result, tmp_path):
    path = tmp_path / "page.html"
    write_compare_report(path, result)
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
    write_compare_report(tmp_path / "page.html", result)
    page = Page(tmp_path / "page.html")
    assert page.text.count(HOSTILE) >= 7  # title twice, note, method, data, versions, command
    for text in ("0.4600 ± 0.0141", "factorize 6.0 s + train 4.0 s", "12x", "6,040", "+0.0150", "+0.0550"):
        assert text in page.text


def test_plots_take_the_colours_of_the_page(result, tmp_path):
    write_compare_report(tmp_path / "page.html", result)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "#0101" not in text
    assert "#0102" not in text
    drawn = text[text.index("<svg") :]
    place = [method.key for method in result.methods].index("cadc")
    assert f"var(--series-{place})" in drawn
    assert not re.search(r"(fill|stroke): ?#(?!000000)", drawn)


def test_plots_without_points_are_left_out(result, tmp_path):
    methods = tuple(
        dataclasses.replace(m, seeds=tuple(dataclasses.replace(s, curve=(), seconds={}) for s in m.seeds))
        for m in result.methods
    )
    write_compare_report(tmp_path / "page.html", dataclasses.replace(result, methods=methods, sweeps=()))
    assert "svg" not in Page(tmp_path / "page.html").tags


def test_hostile_text_in_a_plot_is_escaped(tmp_path):
    figure = Figure()
    figure.add_subplot().plot([1, 2], color=SERIES[0], label=HOSTILE)
    figure.legend()
    svg = plot_svg(figure, "plot")
    write_report(tmp_path / "page.html", "Plot", [Section("", [Plot(svg, HOSTILE, HOSTILE)])])
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_a_page_that_cannot_be_written_is_an_error(result, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_compare_report(tmp_path / "nowhere" / "page.html", result)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_compare_report(tmp_path / "folder", result)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
