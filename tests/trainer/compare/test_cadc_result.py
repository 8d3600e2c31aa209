"""The result of `compare cadc`: figures, ties, the table for the terminal."""

import dataclasses
import json
import math
import re

import pytest

from recpress.trainer.compare.cadc_report import cadc_report
from recpress.trainer.compare.cadc_result import (
    SeedResult,
    differences,
    format_table,
)
from tests.trainer.compare.results import HOSTILE, cadc_result, method, points


@pytest.fixture
def result():
    return cadc_result()


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
