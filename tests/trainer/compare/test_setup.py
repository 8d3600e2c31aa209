"""The log that comparisons need."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.errors import InputError
from recpress.trainer.compare.cadc import compare_cadc
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.setup import quiet, train_config
from tests.trainer.compare.configs import cadc_config


def test_a_log_without_held_out_rows_is_refused(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    pq.write_table(pa.table({"user_id": [0, 1], "item_id": [0, 1]}), log / "train.parquet")
    with pytest.raises(InputError, match="no held-out rows"):
        compare_cadc(replace(cadc_config(tmp_path / "out"), data=str(log)))
    assert list(tmp_path.iterdir()) == [log]


def test_quiet_discards_standard_output(capsys):
    with quiet():
        print("a line of a stage")
    print("a line of the comparison")
    assert capsys.readouterr().out == "a line of the comparison\n"


def test_one_seed_is_that_of_all_draws_of_a_network():
    config = train_config(CompareCadcConfig().frozen, {"storage": "int8"}, 7, 0.25, data="log", out="out")
    assert {config.seed, config.stream.seed, config.negatives.seed, config.sample.seed} == {7}
    assert (config.sample.rate, config.model.tables.storage, config.tensorboard) == (0.25, "int8", False)
