"""Shuffle windows: which row goes where, and when memory is free."""

import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.loader import InteractionStream
from recpress.data.stream.order import EpochOrder
from recpress.data.stream.read_plan import ReadAhead, ReadPlan
from recpress.data.stream.shuffle_window import ShuffleWindow


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_window_holds_the_rows_that_the_order_defines(shuffle, world):
    """More ranks than lanes share them; row groups end within tiles; the last step is smaller."""
    order = EpochOrder(np.array([700, 3, 1300]), 40 * world, shuffle=shuffle, buffer_rows=900, interleave=2)
    starts = np.concatenate(([0], np.cumsum(order.counts)))
    for rank in range(world):
        plan = ReadPlan(order, rank, world, 0)
        windows = {}
        for read in plan.reads:
            rows = {"row": np.arange(starts[read.group], starts[read.group + 1])}
            for segment in read.segments:
                number = segment.window
                if number not in windows:
                    rows_of = plan.rows_of[number]
                    windows[number] = ShuffleWindow(order, number, rank, world, rows, rows_of)
                windows[number].fill(segment, rows)
        for step in range(order.num_steps(world)):
            _, columns, size = windows[order.window_of(step)].batch(step)
            where = order.locate(step, rank, world)
            assert size == order.step_rows(step, world) == len(where)
            assert columns["row"].tolist() == (starts[where[:, 0]] + where[:, 1]).tolist()


def test_memory_is_free_once_no_batch_is_left(tmp_path):
    """A batch outlives the stream's window; no window outlives its batches."""
    user = np.arange(60_000)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 7}), tmp_path / "train.parquet", row_group_size=1000)
    log = open_log(tmp_path)
    config = StreamConfig(batch_size=50, buffer_rows=4000, interleave=4, num_threads=1)
    stream = InteractionStream(log.train, log.schema, config)
    most = ReadPlan(stream.order, 0, 1, 0).most_windows() + 1
    windows: list[weakref.ref] = []
    original = ReadAhead._new_window

    def noted(self, number, columns):
        made = original(self, number, columns)
        windows.append(weakref.ref(made._buffers[0].flat.untyped_storage()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadAhead, "_new_window", noted)
        first = next(rows := iter(stream))
        before = first.user.clone()
        for _ in rows:
            assert sum(window() is not None for window in windows) <= most + 1  # the one of the first batch
    assert len(windows) == stream.order.num_windows > most + 1
    assert torch.equal(first.user, before)
