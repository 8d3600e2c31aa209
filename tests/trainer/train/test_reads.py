"""How much of the log `recpress train` reads: what its sample needs, and with rejection one pass more."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.modules.config import TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.config import OptimizerConfig, TrainConfig
from recpress.trainer.train.stage import train

GROUPS, GROUP, EPOCHS = 20, 50, 2
PASSES = EPOCHS + 1  # over the sample: the first for the validation rows in it


def write(folder, items):
    rng = np.random.default_rng(0)
    folder.mkdir()
    ids = {"user_id": rng.integers(0, 40, GROUPS * GROUP), "item_id": rng.integers(0, items, GROUPS * GROUP)}
    pq.write_table(pa.table(ids), folder / "train.parquet", row_group_size=GROUP)


@pytest.mark.parametrize(
    ("items", "sample", "reject", "reads", "groups"),
    [
        (30, SampleConfig(rate=0.1, kind="block"), "auto", 2 * PASSES, 2),
        (30, SampleConfig(rate=0.1, kind="block"), "yes", 2 * PASSES + GROUPS, GROUPS),
        (30_000, SampleConfig(rate=0.1), "auto", GROUPS * PASSES, GROUPS),
        (30, SampleConfig(rate=0.1), "no", GROUPS * PASSES, GROUPS),
        (30, SampleConfig(rate=0.1), "auto", GROUPS * PASSES + GROUPS, GROUPS),  # a dense log
    ],
)
def test_row_groups_that_are_read(tmp_path, monkeypatch, items, sample, reject, reads, groups):
    write(tmp_path / "log", items)
    read = []
    original = ParquetSplit.read_table

    def counted(self, group, *names):
        read.append((group.file, group.group))
        return original(self, group, *names)

    monkeypatch.setattr(ParquetSplit, "read_table", counted)
    tables = TablesConfig(strategy="random", dim=4)
    train(
        TrainConfig(
            data=str(tmp_path / "log"),
            out=str(tmp_path / "model"),
            model=TwoTowerConfig(tables=tables, towers=TowersConfig(kind="mlp", hidden=(4,), dim=4)),
            stream=StreamConfig(batch_size=16),
            negatives=NegativesConfig(count=4, shared=True, reject_positives=reject),
            optimizer=OptimizerConfig(schedule="constant"),
            sample=sample,
            epochs=EPOCHS,
            tensorboard=False,
        )
    )
    assert (len(read), len(set(read))) == (reads, groups)
