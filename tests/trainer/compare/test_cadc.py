"""The comparison on a small synthetic log: every strategy, the table, the page, and nothing where it cannot run."""

import json
from dataclasses import replace

import pytest

from recpress.trainer.compare.cadc import compare_cadc
from recpress.trainer.compare.cadc_runs import STRATEGIES
from tests.trainer.compare.configs import cadc_config

pytestmark = pytest.mark.slow  # trains models


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "compare"
    return compare_cadc(cadc_config(out)), out


def test_every_strategy_is_run_on_every_seed(result):
    found, _ = result
    keys = [method.key for method in found.methods]
    assert keys == ["popularity", "bpr", "factors", *(strategy.key for strategy in STRATEGIES)]
    assert all(len(method.seeds) == 2 for method in found.methods[2:])
    rows = {method.key: method.rows for method in found.methods}
    assert rows["random-all"] == found.total_rows == 16_000
    assert rows["freeze-all"] > 15_000
    for key in ("cadc", "random-sample", "train-sample"):
        assert 1300 < rows[key] < 1800
    sizes = {method.key: method.table_bytes for method in found.methods}
    assert sizes["factors"] == 4 * 16 * 900
    assert sizes["random-all"] == 4 * 64 * 900


def test_speedups_are_to_the_best_quality_of_the_reference(result):
    found, _ = result
    reference = found.method("random-all")
    best = max(reference.curve, key=lambda point: point.metrics["NDCG@10"])
    assert found.goal == best.metrics["NDCG@10"]
    assert found.seconds_to_goal(reference) == best.seconds
    assert found.speedup(reference) == 1
    factors, ours = found.method("factors"), found.method("cadc")
    assert len(factors.curve) == 1
    assert ours.curve[0] == factors.curve[0]  # epoch 0 is the factorization
    assert all(point.seconds > factors.curve[0].seconds for point in ours.curve[1:])


def test_what_starts_from_factors_is_not_below_them_on_validation_rows(result):
    found, _ = result
    start = found.method("factors").curve[0].metrics["NDCG@10"]
    for key in ("train-sample", "cadc", "freeze-all"):
        assert max(point.metrics["NDCG@10"] for point in found.method(key).curve) >= start


def test_a_network_below_its_factors_is_not_published(tmp_path, monkeypatch):
    """Rates that ruin the frozen network and leave the random one as it is: epoch 0 wins, and a warning names the
    other."""
    for module in ("cadc", "cadc_choose"):
        few = tuple(s for s in STRATEGIES if s.key in ("random-all", "cadc"))
        monkeypatch.setattr(f"recpress.trainer.compare.{module}.STRATEGIES", few)
    config = replace(cadc_config(tmp_path / "out"), seeds=(0,), trials=1, bpr=False)
    frozen = replace(config.frozen, epochs=1, optimizer=replace(config.frozen.optimizer, learning_rate=0.5))
    still = replace(config.random.optimizer, learning_rate=1e-9, table_learning_rate=1e-9)
    found = compare_cadc(replace(config, frozen=frozen, random=replace(config.random, epochs=1, optimizer=still)))
    assert found.method("cadc").seeds[0].metrics == found.method("factors").seeds[0].metrics
    assert "epoch 0" in found.method("cadc").description
    assert found.method("cadc").parts.keys() == {"factorize", "cross-fit", "train"}
    assert found.method("random-all").mean("HR@10") < 0.2  # an untrained network, not the factorization
    assert any("Two-tower, random init, 100 %" in text and "popularity" in text for text in found.warnings)
    assert [method.key for method in found.methods] == ["popularity", "factors", "random-all", "cadc"]


def test_times_hold_the_factorization_where_it_was_needed(result):
    found, _ = result
    parts = {method.key: set(method.parts) for method in found.methods}
    assert parts["random-all"] == parts["random-sample"] == {"train"}
    assert parts["bpr"] <= {"train"}  # none where implicit is not installed
    assert parts["cadc"] == {"factorize", "cross-fit", "train"}
    assert parts["freeze-all"] == parts["train-sample"] == {"factorize", "train"}
    assert parts["factors"] == {"factorize"}


def test_the_factorization_and_cadc_beat_popularity(result):
    found, _ = result
    popularity = found.method("popularity").mean("HR@10")
    assert found.method("factors").mean("HR@10") > popularity + 0.1
    assert found.method("cadc").mean("HR@10") > popularity + 0.1


def test_the_page_and_the_results_are_written(result):
    found, out = result
    saved = json.loads((out / "result.json").read_text())
    assert saved["version"] == 2
    assert [method["key"] for method in saved["methods"]] == [method.key for method in found.methods]
    assert saved["methods"][-1]["seeds"][0]["metrics"] == found.methods[-1].seeds[0].metrics
    page = (out / "report.html").read_text()
    assert "a synthetic log" in page
    assert all(method.name in page for method in found.methods)
