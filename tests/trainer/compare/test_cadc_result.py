"""The result of `compare cadc`: figures, ties, the table for the terminal."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from recpress.trainer.compare.cadc import _warnings
from recpress.trainer.compare.cadc_report import cadc_report
from recpress.trainer.compare.cadc_result import (
    SeedResult,
    format_table,
)
from recpress.trainer.compare.ties import all_differences
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


def compared(result, **values):
    """The result with methods of these values per user and seed, and their paired differences."""
    methods = {key: method(key, [of.mean() for of in seeds], {}) for key, seeds in values.items()}
    others = tuple(method for method in result.methods if method.key not in methods)
    differences = {"NDCG@10": all_differences(values)}
    return dataclasses.replace(result, methods=(*others, *methods.values()), differences=differences)


def test_ties_are_what_a_paired_test_over_users_and_seeds_cannot_tell_apart(result):
    rng = np.random.default_rng(0)
    base = [0.5 + 0.1 * rng.standard_normal(1000) for _ in range(2)]
    noise = [0.1 * rng.standard_normal(1000) for _ in range(2)]
    values = {"best": base}
    for key, lower in (("near", 0.001), ("far", 0.05)):
        values[key] = [b + n - n.mean() - lower for b, n in zip(base, noise, strict=True)]
    found = compared(result, **values)
    best, near, far = (found.method(key) for key in ("best", "near", "far"))
    assert found.mark(best, "NDCG@10") == "best"
    assert found.mark(near, "NDCG@10") == "tied"
    assert found.mark(far, "NDCG@10") == ""
    assert found.above(best, far, "NDCG@10")
    assert not found.above(far, best, "NDCG@10")
    assert not found.above(best, near, "NDCG@10")
    assert found.mark(found.method("mf"), "NDCG@10") == ""  # it has no values per user
    text = format_table(found)
    assert "=: level with the best" in text
    assert next(line for line in text.splitlines() if "near 10 %" in line).count(" =") == 1


def test_what_is_better_by_no_more_than_noise_is_no_warning(result):
    rng = np.random.default_rng(0)
    cadc, noise = rng.random(500), 0.1 * rng.standard_normal(500)
    noise -= noise.mean()
    values = {
        "popularity": [cadc - 0.02],
        "bpr": [cadc + 0.001 + noise],  # better than cadc, within noise
        "factors": [cadc - 0.019 + noise],  # better than popularity, within noise
        "random-all": [cadc + 0.02],
        "cadc": [cadc],
    }
    found = dataclasses.replace(compared(result, **values), metrics=("NDCG@10",))
    warnings = _warnings(found)
    assert len(warnings) == 2
    assert "factors 10 % is no better than popularity" in warnings[0]
    assert "random-all 10 % is better than cadc 10 %" in warnings[1]


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
