"""The log that comparisons need."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.trainer.compare.cadc import compare_cadc
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.setup import gather_cases, quiet, rank_by_popularity, train_config
from recpress.trainer.config import EvaluationConfig
from tests.ranks import run_on_ranks
from tests.trainer.compare.configs import cadc_config


def test_a_log_without_held_out_rows_is_refused(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(pa.table({"user_id": [0, 1], "item_id": [0, 1]}), log / "train.parquet")
    with pytest.raises(InputError, match="no held-out rows"):
        compare_cadc(replace(cadc_config(tmp_path / "out"), data=str(log)))
    assert list(tmp_path.iterdir()) == [log]


def _rank_popular(log):
    cases = {}
    metrics = rank_by_popularity(open_log(log, None), EvaluationConfig(), cases)
    gathered = gather_cases(cases, ["HR@10", "NDCG@10"])
    return metrics, gathered, len(cases["HR@10"])


def test_the_values_of_all_cases_are_gathered_on_every_rank(tmp_path):
    synth(SynthConfig(users=1200, items=300, rows=12_000, tastes=4), tmp_path / "log")
    first, second = run_on_ranks(_rank_popular, 2, str(tmp_path / "log"))
    assert min(first[2], second[2]) > 0
    assert first[2] + second[2] == len(first[1]["HR@10"]) == first[0]["cases"]
    for metrics, gathered, _ in (first, second):
        for name, values in gathered.items():
            assert values.mean() == pytest.approx(metrics[name], abs=1e-8)
            assert (values == first[1][name]).all()


def test_quiet_discards_standard_output(capsys):
    with quiet():
        print("a line of a stage")
    print("a line of the comparison")
    assert capsys.readouterr().out == "a line of the comparison\n"


def test_one_seed_is_that_of_all_draws_of_a_network():
    config = train_config(CompareCadcConfig().frozen, {"storage": "int8"}, 7, 0.25, data="log", out="out")
    assert {config.seed, config.stream.seed, config.negatives.seed, config.sample.seed} == {7}
    assert (config.sample.rate, config.model.tables.storage, config.tensorboard) == (0.25, "int8", False)
