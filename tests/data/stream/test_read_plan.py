"""What a rank reads, how far ahead, and what happens to its errors."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.errors import InputError
from recpress.data.stream.loader import InteractionStream
from recpress.data.stream.order import EpochOrder
from recpress.data.stream.read_plan import ReadAhead, ReadPlan


def numbers(folder, rows, group):
    user = np.arange(rows)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 1000}), folder / "train.parquet", row_group_size=group)
    return open_log(folder)


def stream(log, **config):
    return InteractionStream(log.train, log.schema, StreamConfig(**config))


def test_a_plan_in_the_order_of_the_files():
    """Three row groups and two windows of 600 rows: the second row group has rows of both."""
    order = EpochOrder(np.array([400, 300, 500]), 100, shuffle=False, buffer_rows=600)
    plan = ReadPlan(order, 0, 1, 0)
    found = [(read.group, read.step, part.window, part.count) for read in plan.reads for part in read.segments]
    assert found == [(0, 0, 0, 400), (1, 0, 0, 200), (1, 0, 1, 100), (2, 6, 1, 500)]
    assert plan.rows_of == {0: 600, 1: 600}
    assert (plan.largest, plan.lanes, plan.limit) == (500, 1, 2 * 600 + 500)
    resumed = ReadPlan(order, 0, 1, 8)  # of the second window
    assert [(read.group, read.step) for read in resumed.reads] == [(1, 8), (2, 8)]


def test_each_rank_plans_its_share():
    order = EpochOrder(np.full(40, 1000), 80, seed=2, buffer_rows=2000, interleave=4)
    plans = [ReadPlan(order, rank, 2, 0) for rank in range(2)]
    assert [sum(plan.rows_of.values()) for plan in plans] == [20_000, 20_000]
    assert [plan.lanes for plan in plans] == [2, 2]
    assert not {read.group for read in plans[0].reads} & {read.group for read in plans[1].reads}
    assert all(1 < plan.most_windows() < order.num_windows for plan in plans)


def test_windows_in_memory_are_bounded(tmp_path, monkeypatch):
    log = numbers(tmp_path, 60_000, 1000)
    part = stream(log, batch_size=50, buffer_rows=4000, interleave=4, num_threads=3)
    most = ReadPlan(part.order, 0, 1, 0).most_windows()
    seen = []
    original = ReadAhead._new_window

    def counted(self, number, columns):
        seen.append(len(self._filling) + len(self._ready) + 1)
        return original(self, number, columns)

    monkeypatch.setattr(ReadAhead, "_new_window", counted)
    assert sum(batch.size for batch in part) == 60_000
    assert max(seen) <= most < part.order.num_windows


def test_resume_reads_only_what_its_windows_need():
    """At any point of a log of 100 million rows: the row groups before the first batch do not grow with the step."""
    order = EpochOrder(np.full(400, 250_000), 8192, seed=1)
    for start in (0, 1, 4000, 8000, 12_000):
        reads = order.reads(0, 1, start)
        assert sum(read.step <= start for read in reads) <= 3 * 8


def test_an_error_of_a_thread_names_the_row_group_and_ends_all_threads(tmp_path, monkeypatch):
    log = numbers(tmp_path, 20_000, 1000)
    read = ParquetSplit.read_table

    def fails(self, group, *names):
        if group.group == 7:
            raise InputError("damaged")
        return read(self, group, *names)

    monkeypatch.setattr(ParquetSplit, "read_table", fails)
    with pytest.raises(InputError, match="damaged") as error:
        list(stream(log, batch_size=50, buffer_rows=4000, num_threads=2))
    assert any("row group 7" in note for note in error.value.__notes__)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("recpress-stream-")]
