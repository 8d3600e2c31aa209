import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from recpress.data.config import Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.stream.keyed import Keyed, KeyedBatches
from recpress.data.stream.loader import InteractionStream, StreamDataset

ROWS = 500


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    user = np.arange(ROWS)
    price = user.astype(np.float32)
    price[7] = np.nan
    columns = {
        "user_id": user,
        "item_id": user * 7 % 101,
        "label": (user % 2).astype(np.float32),
        "kind": user % 5,
        "tags": pa.array([list(range(u, u + u % 3)) for u in user.tolist()], pa.list_(pa.int64())),
        "price": price,
        "age": -user.astype(np.float64),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=60)
    return open_log(folder, Schema(label="label", categorical=("kind", "tags"), floats=("price", "age")))


def batches(log, keys=None, prefetch_batches=2, **kwargs):
    config = StreamConfig(batch_size=64, buffer_rows=200, prefetch_batches=prefetch_batches, num_threads=2)
    return KeyedBatches(InteractionStream(log.train, log.schema, config), keys, **kwargs)


@pytest.mark.parametrize("ready", [0, 1, 3])
@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["kind", "user_id"], ["tags", "item_id", "kind"]])
def test_features_are_the_columns(log, keys, ready):
    made = batches(log, keys, ready)
    seen = 0
    for rows, batch in zip(made.stream, made, strict=True):
        size = rows.size
        assert batch.features.keys() == keys
        assert batch.features.stride() == size
        columns = {"user_id": rows.user, "item_id": rows.item, **rows.categorical}
        for name in keys:
            found = batch.features[name]
            if name == "tags":
                assert torch.equal(found.values(), columns[name].values)
                assert torch.equal(found.lengths(), columns[name].lengths)
            else:
                assert torch.equal(found.values(), columns[name])
                assert torch.equal(found.lengths(), torch.ones(size, dtype=torch.int64))
        assert torch.equal(batch.dense, rows.floats.nan_to_num(0.0))
        assert torch.equal(batch.label, rows.label)
        seen += size
    assert seen == ROWS


def test_values_that_lie_together_are_not_copied(log):
    made = batches(log, ["user_id", "item_id", "kind"], prefetch_batches=0)
    rows = next(iter(made.stream))
    values = made.keyed(rows).features.values()
    assert values.data_ptr() == rows.user.data_ptr()


def test_transforms_run_before_the_batch(log):
    made = batches(log, ["user_id", "tags"], transforms={"user_id": lambda ids: ids // 2, "tags": lambda ids: ids + 1})
    for rows, batch in zip(made.stream, made, strict=True):
        assert torch.equal(batch.features["user_id"].values(), rows.user // 2)
        assert torch.equal(batch.features["tags"].values(), rows.categorical["tags"].values + 1)


def test_keys_that_cannot_be(log):
    with pytest.raises(InputError, match="key 'price'"):
        batches(log, ["price"])
    with pytest.raises(InputError, match="transform of column 'kind'"):
        batches(log, ["user_id"], transforms={"kind": torch.neg})
    with pytest.raises(InputError, match="'user_id' made"):
        next(iter(batches(log, ["user_id"], transforms={"user_id": lambda ids: ids[1:]})))


def same(one, other):
    """Whether two keyed batches are the same."""
    pairs = [(one.dense, other.dense), (one.label, other.label)]
    pairs += [(one.features.values(), other.features.values()), (one.features.lengths(), other.features.lengths())]
    return one.features.keys() == other.features.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["tags", "item_id", "kind"]])
def test_in_a_data_loader_batches_and_order_are_the_same(log, keys):
    made = pickle.loads(pickle.dumps(batches(log, keys)))  # as for workers that are spawned
    for workers in (0, 1, 3):
        loader = DataLoader(made, batch_size=None, num_workers=workers)
        assert len(loader) == len(made)
        for epoch in (0, 1):
            made.stream.set_epoch(epoch)
            found = list(loader)
            assert all(same(one, other) for one, other in zip(found, made, strict=True))


class Own(IterableDataset):
    """A dataset that somebody writes around keyed batches."""

    def __init__(self, made):
        self.made = made

    def __iter__(self):
        yield from self.made


def test_around_keyed_batches_no_row_comes_twice(log):
    made = batches(log, ["user_id"])
    found = list(DataLoader(Own(made), batch_size=None, num_workers=2))
    assert sorted(torch.cat([batch.features.values() for batch in found]).tolist()) == list(range(ROWS))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["tags", "kind"]])
def test_keyed_batches_of_a_data_loader_of_rows(log, keys, workers):
    made = batches(log, keys)
    loader = DataLoader(StreamDataset(made.stream), batch_size=None, num_workers=workers)
    assert all(same(one, other) for one, other in zip(map(Keyed(keys), loader), made, strict=True))


def test_what_cannot_work_in_a_worker_is_named(log, monkeypatch):
    """As seen by a worker; a DataLoader whose worker has raised takes five seconds to end."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", SimpleNamespace(id=0, num_workers=2))
    made = batches(log, ["user_id"])
    assert len(list(made)) == len(made) / 2
    with pytest.raises(InputError, match="persistent_workers=False"):
        list(made)
    made.stream.set_epoch(1)  # by the worker itself
    assert len(list(made)) == len(made) / 2
    with pytest.raises(InputError, match=r"DataLoader\(pin_memory=True\)"):
        list(batches(log, ["user_id"], pin_memory=True))
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=64), pin_memory=True)
    with pytest.raises(InputError, match=r"DataLoader\(pin_memory=True\)"):
        list(StreamDataset(stream))


def test_rows_without_a_key_are_named(log):
    rows = next(iter(batches(log).stream))
    with pytest.raises(InputError, match=r"key 'shop'.*user_id"):
        Keyed(["user_id", "shop"])(rows)
    with pytest.raises(InputError, match=r"key 'shop'.*tags"):
        Keyed(["tags", "shop"])(rows)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_infinite_floats_are_refused_by_place(tmp_path, value):
    price = np.full(40, 2.0)
    price[[3, 27]] = np.nan, value
    table = pa.table({"user_id": np.arange(40), "item_id": np.arange(40), "price": price})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=20)
    log = open_log(tmp_path, Schema(floats=("price",)))
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=8))
    with pytest.raises(InputError, match=r"train.parquet, row group 1, column 'price', row 7: .*finite"):
        list(KeyedBatches(stream))


# ---- the thread


def test_threads_of_stream_and_batches_end_together(log):
    results = iter(batches(log))
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]
