"""Damaged files under `recpress train --stream.on-bad-file skip`, on two ranks."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig
from recpress.data.errors import InputError
from recpress.modules.config import TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer import open_log as damaged
from recpress.trainer.config import OptimizerConfig, TrainConfig
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

GROUP = 50


def write_log(folder):
    folder.mkdir()
    for number in range(4):
        users = np.arange(number * 4 * GROUP, (number + 1) * 4 * GROUP) % 70
        table = pa.table({"user_id": users, "item_id": users % 30})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=GROUP)


def damage(path, group):
    chunk = pq.read_metadata(path).row_group(group).column(1)
    with open(path, "r+b") as target:
        target.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        target.write(b"\xff" * chunk.total_compressed_size)


def config(root, on_bad_file, reject=False):
    return TrainConfig(
        data=str(root / "log"),
        out=str(root / "model"),
        model=TwoTowerConfig(
            tables=TablesConfig(strategy="random", dim=4), towers=TowersConfig(kind="mlp", hidden=(4,), dim=4)
        ),
        stream=StreamConfig(batch_size=16, interleave=2, on_bad_file=on_bad_file),
        negatives=NegativesConfig(count=2, reject_positives="yes" if reject else "no"),
        optimizer=OptimizerConfig(schedule="constant"),
        sample=SampleConfig(rate=1.0),
        epochs=2,
        tensorboard=False,
    )


def run(root, on_bad_file, reject):
    result = train(config(root, on_bad_file, reject))
    return result.fit.steps, result.fit.rows


@pytest.mark.parametrize(
    ("world", "reject", "each"),
    [
        (2, False, (38, 600)),  # 600 rows in 18 steps of 32 and one of 24
        (1, True, (76, 1200)),  # the whole log is read before training, for the pairs of each user
    ],
)
def test_a_lost_row_group_leaves_all_ranks_with_equal_steps(tmp_path, world, reject, each):
    write_log(tmp_path / "log")
    damage(tmp_path / "log" / "train-1.parquet", 2)
    damage(tmp_path / "log" / "train-3.parquet", 0)
    os.truncate(tmp_path / "log" / "train-2.parquet", 100)
    assert run_on_ranks(run, world, tmp_path, "skip", reject) == [each] * world
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert list(manifest["bad_files"]) == [f"{tmp_path}/log/train-2.parquet"]
    assert (manifest["bad_row_groups"], manifest["lost_rows"], manifest["rows"]) == (2, 2 * GROUP, 600)
    last = json.loads((tmp_path / "model" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {name: last[f"stream/{name}"] for name in ("bad_files", "bad_row_groups", "lost_rows")} == {
        "bad_files": 1.0,
        "bad_row_groups": 2.0,
        "lost_rows": 100.0,
    }


def test_stop_names_the_row_group(tmp_path):
    write_log(tmp_path / "log")
    damage(tmp_path / "log" / "train-1.parquet", 2)
    with pytest.raises(InputError, match=r"train-1.parquet, row group 2: cannot be read"):
        run_on_ranks(run, 1, tmp_path, "stop", False)


def open_apart(root):
    """One rank cannot open a file that the other can."""
    whole = damaged.open_log

    def broken(*args, **kwargs):
        log = whole(*args, **kwargs)
        if dist.get_rank() == 1 and not kwargs.get("bad"):
            path = log.train.files[3].path
            return whole(*args, **kwargs | {"bad": {path: f"{path}: cannot be read"}})
        return log

    damaged.open_log = broken
    log = damaged.open_on_all_ranks(str(root / "log"), None, skip=True)
    return [os.path.basename(path) for path in log.bad_files], log.train.num_rows


def test_a_file_that_one_rank_cannot_open_is_left_out_on_all(tmp_path):
    write_log(tmp_path / "log")
    assert run_on_ranks(open_apart, 2, tmp_path) == [(["train-3.parquet"], 12 * GROUP)] * 2
