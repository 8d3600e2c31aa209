"""The comparison on a small made log: every strategy, the table, the page, and nothing where it cannot run."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recpress.data.config import SynthConfig
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig
from recpress.trainer.compare.cadc import STRATEGIES, compare_cadc
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.report.results import load_result


def small(out):
    config = CompareCadcConfig(
        out=str(out),
        synth=SynthConfig(users=500, items=400, rows=16_000, tastes=8, tastes_per_user=4),
        seeds=(0, 1),
        als=ALSConfig(factors=16, sweeps=6, mean_penalty=3.0),
        patience=1,
    )
    shorter = {
        name: replace(getattr(config, name), epochs=2, stream=replace(getattr(config, name).stream, batch_size=512))
        for name in ("frozen", "random", "tuned")
    }
    return replace(config, **shorter)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "compare"
    return compare_cadc(small(out)), out


def test_every_strategy_is_run_on_every_seed(result):
    found, _ = result
    keys = [method.key for method in found.methods]
    assert keys == ["popularity", "factors", *(strategy.key for strategy in STRATEGIES)]
    assert all(len(method.seeds) == 2 for method in found.methods[1:])
    rows = {method.key: method.rows for method in found.methods}
    assert rows["random-all"] == rows["freeze-all"] == found.total_rows == 16_000
    assert rows["cadc"] == rows["random-sample"] == rows["train-sample"]
    assert 1400 < rows["cadc"] < 1800


def test_times_hold_the_factorization_where_it_was_needed(result):
    found, _ = result
    parts = {method.key: set(method.parts) for method in found.methods}
    assert parts["random-all"] == parts["random-sample"] == {"train"}
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
    assert load_result(out / "result.json").methods == found.methods
    page = (out / "report.html").read_text()
    assert "made" in page
    assert all(method.name.split(" (")[0].replace(" %", "\u00a0%") in page for method in found.methods)


def test_a_log_without_held_out_rows_is_refused(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(pa.table({"user_id": [0, 1], "item_id": [0, 1]}), log / "train.parquet")
    with pytest.raises(InputError, match="no held-out rows"):
        compare_cadc(replace(small(tmp_path / "out"), data=str(log)))
    assert list(tmp_path.iterdir()) == [log]
