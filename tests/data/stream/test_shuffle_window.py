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
from recpress.data.stream.order import TILE_ROWS, EpochOrder
from recpress.data.stream.read_plan import ReadPlan
from recpress.data.stream.shuffle_window import BufferPool, ShuffleWindow


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
                    windows[number] = ShuffleWindow(order, number, rank, world, rows, rows_of, BufferPool())
                windows[number].fill(segment, rows)
        for step in range(order.num_steps(world)):
            _, columns, size = windows[order.window_of(step)].batch(step)
            where = order.locate(step, rank, world)
            assert size == order.step_rows(step, world) == len(where)
            assert columns["row"].tolist() == (starts[where[:, 0]] + where[:, 1]).tolist()


def test_the_pool_reuses_memory_once_no_view_is_left():
    pool = BufferPool()
    first = pool.take(torch.int64, 1000)
    view, place = first[10:20], first.data_ptr()
    del first
    assert pool.take(torch.int64, 1000).data_ptr() != place  # a view is left
    del view
    again = pool.take(torch.float32, 2000)  # of another type, and as many bytes
    assert (again.data_ptr(), again.dtype, len(again)) == (place, torch.float32, 2000)
    assert len(pool.take(torch.int64, 0)) == 0


def test_a_batch_that_outlives_its_stream_keeps_only_its_own_window():
    pool = BufferPool()
    kept, other = pool.take(torch.int64, 1000), pool.take(torch.int64, 1000)
    del other
    (free,) = pool._free.values()
    returned = weakref.ref(free[0])
    del free, pool
    assert returned() is None
    kept.fill_(7)  # still its own memory
    assert kept.sum() == 7000


def test_steady_state_takes_no_new_memory(tmp_path, monkeypatch):
    """Epoch after epoch in the memory of a few windows; a batch that is kept stays as it is."""
    places = []
    original = BufferPool.take

    def take(self, dtype, elements):
        taken = original(self, dtype, elements)
        if elements != TILE_ROWS:
            places.append(taken.data_ptr())
        return taken

    monkeypatch.setattr(BufferPool, "take", take)
    user = np.arange(60_000)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 7}), tmp_path / "train.parquet", row_group_size=1000)
    log = open_log(tmp_path)
    config = StreamConfig(batch_size=50, buffer_rows=4000, interleave=4, num_threads=1)
    stream = InteractionStream(log.train, log.schema, config)
    first = next(iter(stream))
    before = first.user.clone()
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert sum(batch.size for batch in stream) == 60_000
    assert torch.equal(first.user, before)
    assert len(places) >= 3 * stream.order.num_windows
    most = ReadPlan(stream.order, 0, 1, 0).most_windows() + 1
    assert len(set(places)) <= most + 1 < stream.order.num_windows  # and the window of the first batch
