"""What a resumed run must have in common with the run before, and its global batch on another world size."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import SampleConfig, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.config import TablesConfig, TwoTowerConfig
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.train.data import make_stream
from recpress.trainer.train.resume import digest, keep_global_batch, open_checkpoints
from tests.ranks import run_on_ranks


def inputs(folder, world=1):
    if not (folder / "train.parquet").exists():
        rng = np.random.default_rng(0)
        table = pa.table({"user_id": rng.integers(0, 9, 400), "item_id": rng.integers(0, 9, 400)})
        pq.write_table(table, folder / "train.parquet")
    tables = TablesConfig(strategy="random", dim=4)
    config = TrainConfig(data=str(folder), out=f"{folder}-model", model=TwoTowerConfig(tables=tables), epochs=1)
    config = replace(config.resolved(), stream=StreamConfig(batch_size=24), sample=SampleConfig())
    log = open_log(folder)
    ranks = Ranks(rank=0, world_size=world, device=torch.device("cpu"))
    return SimpleNamespace(config=config, log=log, stream=make_stream(config, log, ranks)), ranks


def checkpoints(global_batch):
    start = None if global_batch is None else SimpleNamespace(manifest={"global_batch": global_batch})
    return SimpleNamespace(start=start, describe={"global_batch": 24})


def kept(folder, world, global_batch):
    given, ranks = inputs(folder, world)
    found = checkpoints(global_batch)
    stream = keep_global_batch(
        given.stream, found, ranks, lambda rows: make_stream(given.config, given.log, ranks, rows)
    )
    return stream is given.stream, stream.global_batch, found.describe["global_batch"]


@pytest.mark.parametrize(
    ("world", "global_batch", "same", "rows"),
    [(1, None, True, 24), (1, 24, True, 24), (1, 48, False, 48), (2, 24, False, 24)],
)
def test_the_global_batch_is_that_of_the_checkpoint(tmp_path, caplog, world, global_batch, same, rows):
    caplog.set_level(logging.WARNING, "recpress")
    (found,) = run_on_ranks(kept, 1, tmp_path, world, global_batch)
    assert found == (same, rows, 24 if same else rows)
    changed = [line for line in caplog.messages if "world size changed; keeping global batch size" in line]
    assert len(changed) == (not same)


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(InputError, match="a step of 25 rows"):
        run_on_ranks(kept, 1, tmp_path, 2, 25)


def described(folder):
    given, _ = inputs(folder)
    with open_checkpoints(given.config, given.log, given.stream.global_batch, {}) as found:
        return found.start, found.describe


def test_a_run_is_known_by_its_inputs(tmp_path):
    (tmp_path / "log").mkdir()
    ((start, before),) = run_on_ranks(described, 1, tmp_path / "log")
    assert start is None
    assert before["global_batch"] == 24
    table = pq.read_table(tmp_path / "log" / "train.parquet")
    pq.write_table(table.slice(1), tmp_path / "log" / "train.parquet")
    ((_, after),) = run_on_ranks(described, 1, tmp_path / "log")
    different = {name for name, value in after["inputs"].items() if value != before["inputs"][name]}
    assert different == {"log"}
    assert after["config"] == before["config"]


def test_a_digest_depends_on_values_alone():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest([[1, "x"]]) != digest([[1, "y"]])
