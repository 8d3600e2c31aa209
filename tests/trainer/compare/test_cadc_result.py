import dataclasses
import json
import math
import re

import pytest

from recpress.trainer.compare.cadc_result import (
    CadcResult,
    CurvePoint,
    MethodResult,
    SeedResult,
    SweepPoint,
    cadc_report,
    differences,
    format_table,
)
from tests.trainer.report.html import Page

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
    return CadcResult(
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
    assert result.tied(a, b, "NDCG@10")  # the sign changes
    assert not result.tied(a, of("c", [0.45, 0.47, 0.455]), "NDCG@10")
    assert not result.tied(of("p", [0.3]), a, "NDCG@10")  # one run stands for every seed
    assert result.tied(of("p", [0.41]), a, "NDCG@10")
    assert not result.tied(of("a", [0.40]), of("b", [0.401]), "NDCG@10")  # one seed tells nothing of noise
    assert differences(of("p", [0.3]), of("a", [0.4, 0.5]), "NDCG@10") == pytest.approx([-0.1, -0.2])
    near = dataclasses.replace(result, methods=(*result.methods, of("other", [0.46, 0.455])))
    assert near.mark(near.method("cadc"), "NDCG@10") == "best"
    assert near.mark(near.method("mf"), "NDCG@10") == "tied"  # 0.01 and 0.02 below: 3 standard errors
    assert near.mark(near.method("other"), "NDCG@10") == "tied"
    assert near.mark(near.method("random"), "NDCG@10") == ""
    assert "=: tied with the best" in format_table(near)


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


def test_the_json_has_every_figure_and_null_for_nan(result, tmp_path):
    broken = dataclasses.replace(result.methods[0], seeds=(SeedResult(seed=0, metrics={"HR@10": math.nan}),))
    result = dataclasses.replace(result, methods=(broken, *result.methods[1:]))
    result.save(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved["methods"][0]["seeds"][0]["metrics"] == {"HR@10": None}
    assert saved["methods"][3]["curve"][1] == {"seconds": 11, "epoch": 1, "metrics": {"NDCG@10": 0.43}}
    assert (saved["version"], saved["ours"], saved["data"]["Users"]) == (2, "cadc", 6040)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    cadc_report(result).write(tmp_path / "page.html")


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
