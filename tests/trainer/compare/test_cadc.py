"""The comparison on a small synthetic log: every strategy, the table, the page, and nothing where it cannot run."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import LogisticConfig
from recpress.trainer.compare.cadc import _notes, compare_cadc
from recpress.trainer.compare.cadc_result import format_table
from recpress.trainer.compare.cadc_runs import STRATEGIES, runnable
from recpress.trainer.compare.config import MORE_STRATEGIES, CompareCadcConfig
from recpress.trainer.compare.config import STRATEGIES as DEFAULT_STRATEGIES
from recpress.trainer.config import EvaluationConfig
from tests.trainer.compare.configs import cadc_config

pytestmark = pytest.mark.slow  # trains models


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "compare"
    return compare_cadc(cadc_config(out)), out


def test_every_strategy_is_run_on_every_seed(result):
    found, _ = result
    keys = [method.key for method in found.methods]
    assert keys == ["popularity", "bpr", "factors", *DEFAULT_STRATEGIES]
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


def test_a_network_below_its_factors_is_not_published(tmp_path):
    """Rates that ruin the frozen network and leave the random one as it is: epoch 0 wins, and a warning names the
    other."""
    few = ("random-all", "cadc")
    config = replace(cadc_config(tmp_path / "out"), strategies=few, seeds=(0,), trials=1, bpr=False)
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


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """Other ways to reduce the data, and the paper's own setting, on a log with times, all items ranked."""
    folder = tmp_path_factory.mktemp("reduced")
    config = cadc_config(folder / "out")
    synth(config.synth, folder / "log")
    config = replace(
        config,
        data=str(folder / "log"),
        strategies=("random-all", "cadc", "core-sample", "recent-sample", "popular-sample", "paper"),
        seeds=(0,),
        trials=1,
        bpr=False,
        logistic=LogisticConfig(factors=8, epochs=2),
        paper=replace(config.paper, epochs=2),
        evaluation=EvaluationConfig(protocol="full", metric="NDCG@10"),
    )
    return compare_cadc(config), folder


def test_other_ways_to_reduce_the_data_are_rows_of_the_table(reduced):
    found, folder = reduced
    keys = [
        "popularity",
        "factors",
        "logistic",
        "random-all",
        "cadc",
        "core-sample",
        "recent-sample",
        "popular-sample",
        "paper",
    ]
    assert [method.key for method in found.methods] == keys
    saved = json.loads((folder / "out" / "result.json").read_text())
    assert [method["key"] for method in saved["methods"]] == keys
    page, table = (folder / "out" / "report.html").read_text(), format_table(found)
    for name in ("k-core, 10 %", "latest 10 %", "popular items, 10 %", "Logistic MF-init, frozen, 10 % (CADC paper)"):
        assert name in page
        assert name in table
    pairs = {(pair["first"], pair["second"]) for pair in saved["differences"]["NDCG@10"]}
    assert len(pairs) == len(keys) * (len(keys) - 1) // 2


def test_each_network_is_trained_on_its_subset_alone(reduced):
    found, folder = reduced
    for key in ("core", "recent", "popular"):
        method = found.method(f"{key}-sample")
        assert method.rows == round(0.1 * found.total_rows)
        assert set(method.parts) == {"reduce", "train"}
        manifest = json.loads((folder / "out" / "seed-0" / f"{key}-sample" / "manifest.json").read_text())
        train = pq.read_table(folder / "out" / "seed-0" / f"{key}-log" / "train")
        assert manifest["rows"] == train.num_rows == method.rows
    times = pq.read_table(folder / "log" / "train")["time"].to_numpy()
    latest = pq.read_table(folder / "out" / "seed-0" / "recent-log" / "train")["time"].to_numpy()
    assert latest.min() >= np.sort(times)[-len(latest)]


def test_the_paper_row_starts_from_the_logistic_factorization_without_cross_fitting(reduced):
    found, folder = reduced
    paper, logistic = found.method("paper"), found.method("logistic")
    assert set(paper.parts) == {"factorize", "train"}
    assert paper.parts["factorize"] == pytest.approx(logistic.parts["factorize"])
    assert logistic.table_bytes == 4 * 10 * 900  # the vectors and two columns of biases
    assert 1300 < paper.rows < 1800
    assert "epoch 0" not in paper.description  # a network in any case
    manifest = json.loads((folder / "out" / "seed-0" / "paper" / "manifest.json").read_text())
    assert manifest["config"]["factors"].endswith("seed-0/logistic")


def test_the_latest_examples_of_a_log_without_times_are_skipped_with_a_note(tmp_path):
    config = cadc_config(tmp_path / "out")
    synth(config.synth, tmp_path / "timed")
    (tmp_path / "log").mkdir()
    for part in ("train", "test_negatives"):
        table = pq.read_table(tmp_path / "timed" / part)
        pq.write_table(
            table.drop_columns([n for n in table.column_names if n == "time"]), tmp_path / "log" / f"{part}.parquet"
        )
    config = replace(config, data=str(tmp_path / "log"), strategies=("random-all", "cadc", "recent-sample"))
    log = open_log(config.data, None)
    assert [strategy.key for strategy in runnable(config, log)] == ["random-all", "cadc"]
    assert any("recent-sample was not run" in note and "time column" in note for note in _notes(config, log, None))


def test_an_unknown_strategy_is_refused():
    with pytest.raises(InputError, match="'magic'"):
        CompareCadcConfig(strategies=("random-all", "cadc", "magic"))


def test_the_strategies_of_the_configuration_are_those_that_exist():
    every = CompareCadcConfig(strategies=("all",)).chosen_strategies
    assert every == (*DEFAULT_STRATEGIES, *MORE_STRATEGIES) == tuple(s.key for s in STRATEGIES)
