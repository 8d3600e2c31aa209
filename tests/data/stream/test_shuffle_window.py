"""Shuffle windows: which row goes where, and memory that is reused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.loader import InteractionStream
from recpress.data.stream.order import TILE_ROWS, EpochOrder
from recpress.data.stream.read_plan import ReadPlan
from recpress.data.stream.shuffle_window import BufferPool, ShuffleWindow


def test_the_pool_reuses_buffers_of_one_type_and_size():
    pool = BufferPool()
    first = pool.take(torch.int64, 1000)
    assert pool.take(torch.int64, 1000).data_ptr() != first.data_ptr()  # not returned yet
    pool.give(first)
    assert len(pool.take(torch.int64, 500)) == 500
    other = pool.take(torch.float64, 1000)  # integers would cut its values off
    assert other.dtype == torch.float64
    assert pool.take(torch.int64, 1000).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_window_holds_the_rows_that_the_order_defines(shuffle, world):
    """More ranks than lanes share them; row groups end within tiles; the last step is smaller."""
    order = EpochOrder(np.array([700, 3, 1300]), 40 * world, shuffle=shuffle, buffer_rows=900, interleave=2)
    starts = np.concatenate(([0], np.cumsum(order.counts)))
    for rank in range(world):
        plan, pool = ReadPlan(order, rank, world, 0), BufferPool()
        windows = {}
        for read in plan.reads:
            rows = {"row": np.arange(starts[read.group], starts[read.group + 1])}
            for segment in read.segments:
                number = segment.window
                if number not in windows:
                    rows_of = plan.rows_of[number]
                    windows[number] = ShuffleWindow(order, number, rank, world, rows, rows_of, pool)
                windows[number].fill(segment, rows)
        for step in range(order.num_steps(world)):
            _, columns, size = windows[order.window_of(step)].batch(step)
            where = order.locate(step, rank, world)
            assert size == order.step_rows(step, world) == len(where)
            assert columns["row"].tolist() == (starts[where[:, 0]] + where[:, 1]).tolist()


def test_a_batch_outlives_its_window():
    order, pool = EpochOrder(np.array([100]), 10), BufferPool()
    rows = {"row": np.arange(100)}
    window = ShuffleWindow(order, 0, 0, 1, rows, 100, pool)
    for segment in ReadPlan(order, 0, 1, 0).reads[0].segments:
        window.fill(segment, rows)
    _, columns, _ = window.batch(0)
    before = columns["row"].clone()
    window.close()
    ShuffleWindow(order, 0, 0, 1, rows, 100, pool)._buffers[0].flat.zero_()
    assert torch.equal(columns["row"], before)


def test_steady_state_takes_no_new_memory(tmp_path, monkeypatch):
    """Epoch after epoch in the memory of a few windows."""
    taken = []
    original = BufferPool.take

    def take(self, dtype, elements):
        taken.append(original(self, dtype, elements))
        return taken[-1]

    monkeypatch.setattr(BufferPool, "take", take)
    user = np.arange(60_000)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 7}), tmp_path / "train.parquet", row_group_size=1000)
    log = open_log(tmp_path)
    stream = InteractionStream(
        log.train, log.schema, StreamConfig(batch_size=50, buffer_rows=4000, interleave=4, num_threads=1)
    )
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert sum(batch.size for batch in stream) == 60_000
    windows = [buffer.data_ptr() for buffer in taken if len(buffer) != TILE_ROWS]
    assert len(windows) == 3 * stream.order.num_windows
    assert len(set(windows)) <= ReadPlan(stream.order, 0, 1, 0).most_windows() < stream.order.num_windows
