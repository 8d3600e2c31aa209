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
    differences,
    format_seconds,
    format_table,
    load_result,
)

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def method(key, values, seconds, rows=None, curve=(), description="What it does."):
    seeds = tuple(
        SeedResult(seed=n, metrics={"HR@10": v + 0.2, "NDCG@10": v}, seconds=seconds) for n, v in enumerate(values)
    )
    return MethodResult(
        key=key,
        name=f"{key} 10 %",
        description=description,
        seeds=seeds,
        rows=rows,
        table_bytes=1_500_000 if rows else None,
        curve=curve,
    )


def points(*pairs):
    return tuple(CurvePoint(seconds=s, epoch=n, metrics={"NDCG@10": v}) for n, (s, v) in enumerate(pairs))


@pytest.fixture
def result():
    slow = points((1, 0.02), (60, 0.40), (110, 0.42), (120, 0.41))
    fast = points((9, 0.41), (11, 0.43))
    return CompareResult(
        title=HOSTILE,
        methods=(
            method("popularity", [0.25], {}),
            method("mf", [0.44, 0.45], {"factorize": 6.0}),
            method("random", [0.40, 0.41], {"train": 120.0}, 1000, slow),
            method("cadc", [0.45, 0.47], {"factorize": 6.0, "train": 4.0}, 100, fast, HOSTILE),
        ),
        ours="cadc",
        reference="random",
        factorization="mf",
        total_rows=1000,
        sweeps=tuple(SweepPoint(sweep=n, objective=100.0 / n, seconds=n) for n in (1, 2, 3)),
        data={"Log": HOSTILE, "Users": 6040},
        notes=(HOSTILE,),
        warnings=(HOSTILE,),
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


def with_curves(result, **curves):
    return dataclasses.replace(
        result, methods=tuple(dataclasses.replace(m, curve=curves.get(m.key, m.curve)) for m in result.methods)
    )


def test_speedup_is_the_time_to_the_best_quality_of_the_reference(result):
    assert result.goal == 0.42
    assert result.seconds_to_goal(result.method("random")) == 110  # its own best, not its end
    assert result.seconds_to_goal(result.method("cadc")) == 11
    assert result.speedup(result.method("cadc")) == 10
    assert result.speedup(result.method("random")) == 1
    assert math.isnan(result.speedup(result.method("popularity")))
    never = with_curves(result, cadc=points((9, 0.41), (30, 0.419)))
    assert never.speedup(never.method("cadc")) == 0
    assert next(line for line in format_table(never).splitlines() if line.startswith(">")).count("not reached") == 2
    none = with_curves(result, random=())
    assert math.isnan(none.speedup(none.method("cadc")))
    assert "to goal:" not in format_table(none)


def test_ties_are_what_the_seeds_cannot_tell_apart(result):
    def of(key, values):
        return method(key, values, {})

    a, b = of("a", [0.40, 0.42, 0.41]), of("b", [0.41, 0.41, 0.42])
    assert result.level(a, b, "NDCG@10")  # the sign changes
    assert not result.level(a, of("c", [0.45, 0.47, 0.455]), "NDCG@10")
    assert not result.level(of("p", [0.3]), a, "NDCG@10")  # one run stands for every seed
    assert result.level(of("p", [0.41]), a, "NDCG@10")
    assert not result.level(of("a", [0.40]), of("b", [0.401]), "NDCG@10")  # one seed tells nothing of noise
    assert differences(of("p", [0.3]), of("a", [0.4, 0.5]), "NDCG@10") == pytest.approx([-0.1, -0.2])
    near = dataclasses.replace(result, methods=(*result.methods, of("other", [0.46, 0.455])))
    assert near.mark(near.method("cadc"), "NDCG@10") == "best"
    assert near.mark(near.method("mf"), "NDCG@10") == "level"  # 0.01 and 0.02 below: 3 standard errors
    assert near.mark(near.method("other"), "NDCG@10") == "level"
    assert near.mark(near.method("random"), "NDCG@10") == ""
    assert "=: level with the best" in format_table(near)


def test_table_for_the_terminal(result):
    lines = format_table(result).splitlines()
    ours = next(line for line in lines if line.startswith("> cadc"))
    assert re.split(r"\s{2,}", ours) == [
        "> cadc 10 %",
        "0.6600 ± 0.0141",
        "0.4600 ± 0.0141",
        "100 (10 %)",
        "1.5 MB",
        "10 s",
        "11 s",
        "10x",
        "factorize 6.0 s + train 4.0 s",
    ]
    assert any("time to the best NDCG@10" in line and "0.4200" in line for line in lines)
    assert lines[-1] == f"warning: {HOSTILE}"


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 2, "methods": 3}'])
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
    assert page.text.count(HOSTILE) >= 8  # title twice, warning, note, method, data, versions, command
    for text in ("0.4600 ± 0.0141", "factorize 6.0 s\n+ train 4.0 s", "10x", "1.5 MB", "6,040", "+0.0150", "+0.0550"):
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
        dataclasses.replace(m, curve=(), seeds=tuple(dataclasses.replace(s, seconds={}) for s in m.seeds))
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
