"""The latest items of each user, by known answers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SampleConfig, Schema
from recpress.data.dataset.log import open_log
from recpress.data.sampling import histories
from recpress.data.sampling.selection import HoldOut, Selection

USERS = [0, 2, 0, 0, 2, 0, 4]
ITEMS = [5, 1, 3, 5, 2, 0, 6]
TIMES = [9, 4, 1, 7, 3, 7, 0]


def write(folder, **more):
    table = pa.table({"user_id": USERS, "item_id": ITEMS, **more})
    pq.write_table(table, folder / "train.parquet", row_group_size=3)


def lists(found):
    return [found.values[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_the_latest_items_by_time_or_in_the_order_of_the_files(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(histories, "_AT_ONCE", at_once)
    write(tmp_path)
    log = open_log(tmp_path)
    assert lists(histories.latest_items(log, 9)) == [[5, 3, 5, 0], [], [1, 2], [], [6]]
    assert lists(histories.latest_items(log, 2)) == [[5, 0], [], [1, 2], [], [6]]
    write(tmp_path, time=TIMES)
    timed = open_log(tmp_path, Schema(time="time"))
    assert lists(histories.latest_items(timed, 9)) == [[3, 5, 0, 5], [], [2, 1], [], [6]]  # of one time as in the file
    assert lists(histories.latest_items(timed, 1)) == [[5], [], [1], [], [6]]
    assert histories.latest_items(timed, 1).values.dtype == np.int32


def test_rows_that_are_held_out_of_the_sample_do_not_count(tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"user_id": rng.integers(20, size=400), "item_id": np.arange(400)})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=90)
    log, sample, hold_out = open_log(tmp_path), SampleConfig(rate=0.5, seed=3), HoldOut(rate=0.2, seed=3)
    selection = Selection(log.train, sample, hold_out=hold_out)
    held = np.concatenate([90 * group + selection.held_out(group) for group in range(5)])  # the items are the rows
    assert 20 < len(held) < 70
    found = histories.latest_items(log, 400, sample=sample, hold_out=hold_out)
    assert sorted(found.values.tolist()) == sorted(set(range(400)) - set(held.tolist()))
