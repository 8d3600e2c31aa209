"""Memory of rounds that is used again."""

import gc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream import shuffle_window as rounds
from recpress.data.stream.order import TILE_ROWS
from recpress.data.stream.read_plan import ReadPlan
from recpress.data.stream.shuffle_window import BufferPool
from recpress.data.stream.stream import InteractionStream


def test_a_tile_is_used_again_only_for_columns_of_its_types_and_length():
    spare = BufferPool()
    ids = {"user_id": torch.zeros(3, dtype=torch.int64), "time": torch.zeros(3, dtype=torch.int64)}
    tile = spare.take_tile(3, ids)
    assert {name: (column.dtype, len(column)) for name, column in tile.items()} == {
        "user_id": (torch.int64, TILE_ROWS),
        "time": (torch.int64, TILE_ROWS),
    }
    spare.give_tile(tile)
    assert spare.take_tile(3, ids) is tile
    spare.give_tile(tile)
    other = spare.take_tile(3, ids | {"time": torch.zeros(3, dtype=torch.float64)})
    assert other["time"].dtype == torch.float64  # integers would cut its values off
    spare.give_tile(other)
    assert len(spare.take_tile(TILE_ROWS + 1, ids)["time"]) == TILE_ROWS + 1


def test_memory_comes_back_when_its_last_tensor_ends():
    spare = BufferPool()
    kind = np.dtype(np.int64)
    first = spare.take(kind, 1000)
    address = first.data_ptr()
    batch = first.as_strided((10, 3), (3, 1), 7)  # a view, as batches are
    del first
    gc.collect()
    assert spare.take(kind, 1000).data_ptr() != address  # a batch is left
    numbers = batch.numpy()
    del batch
    assert spare.take(kind, 1000).data_ptr() != address  # an array of its memory counts, too
    del numbers
    again = [spare.take(kind, 500), spare.take(kind, 1000)]
    assert address in [tensor.data_ptr() for tensor in again]
    assert again[0].data_ptr() != again[1].data_ptr()


def test_memory_that_is_too_small_is_let_go():
    spare = BufferPool()
    del (small := [spare.take(np.dtype(np.int64), 10) for _ in range(3)])[:]
    assert len(small) == 0
    large = spare.take(np.dtype(np.int64), 100)
    assert len(large) == 100
    assert not spare._free


def test_memory_outlives_its_pool():
    spare = BufferPool()
    tensor = spare.take(np.dtype(np.float32), 100).fill_(3.0)
    del spare
    gc.collect()
    assert torch.equal(tensor, torch.full((100,), 3.0))


def test_steady_state_maps_no_new_memory(tmp_path, monkeypatch):
    """Epoch after epoch in the memory of a few rounds, where each batch is dropped before the next."""
    mapped = []
    original = rounds._mapped
    monkeypatch.setattr(rounds, "_mapped", lambda size: mapped.append(size) or original(size))
    user = np.arange(60_000)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 7}), tmp_path / "train.parquet", row_group_size=1000)
    log = open_log(tmp_path)
    stream = InteractionStream(
        log.train, log.schema, StreamConfig(batch_size=50, buffer_rows=4000, interleave=4, num_threads=1)
    )
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert sum(batch.size for batch in stream) == 60_000
    in_use = ReadPlan(stream.order, 0, 1, 0).most_windows() + 2
    assert len(mapped) <= 2 * in_use < 3 * stream.order.num_windows  # two sizes: the last round is larger
