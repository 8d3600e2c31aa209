import gc
import itertools
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.data.stream.loader import InteractionStream, JaggedColumn, StreamDataset

SCHEMA = Schema(label="rating", time="time", categorical=("kind", "tags"), floats=("price", "age"))


def table(first: int, rows: int) -> pa.Table:
    """Rows whose user id is their number in the log, and whose other columns follow from it."""
    user = np.arange(first, first + rows)
    return pa.table(
        {
            "user_id": user.astype(np.int32),
            "item_id": user * 7 % 101,
            "rating": user.astype(np.float64) / 2,
            "time": user + 1000,
            "kind": (user % 5).astype(np.int16),
            "tags": pa.array([list(range(u, u + u % 4)) for u in user.tolist()], pa.list_(pa.int64())),
            "price": user.astype(np.float32) * 3,
            "age": -user.astype(np.float64),
        }
    )


def make_log(folder: Path, files: list[list[int]]) -> Log:
    """A log with the given rows in each row group of each file."""
    first = 0
    for number, groups in enumerate(files):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(folder / "train" / f"{number}.parquet", table(0, 1).schema) as writer:
            for rows in groups:
                writer.write_table(table(first, rows), row_group_size=max(rows, 1))
                first += rows
    return open_log(folder, SCHEMA)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("log"), [[30, 1, 50], [17], [64, 64, 23]])  # 249 rows


def stream(log: Log, config: StreamConfig, **kwargs) -> InteractionStream:
    return InteractionStream(log.train, log.schema, config, **kwargs)


def users(batches) -> list[list[int]]:
    return [batch.user.tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def no_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]


def members(log: Log, sample: SampleConfig, complement: bool = False) -> set[int]:
    """The sample's rows by the log's own definition, row group by row group."""
    parts = iter_columns(log.train, ["user_id"], sample=sample, complement=complement)
    return set(np.concatenate([part["user_id"] for part in parts]).tolist())


def test_columns_stay_together(log):
    config = StreamConfig(batch_size=16, buffer_rows=40, interleave=3)
    columns = ["user_id", "item_id", "rating", "time", "kind", "tags", "price", "age"]
    seen = 0
    for batch in stream(log, config, columns=columns):
        u = batch.user
        assert u.dtype == batch.item.dtype == batch.time.dtype == batch.categorical["kind"].dtype == torch.int64
        assert batch.label.dtype == batch.floats.dtype == torch.float32
        assert torch.equal(batch.item, u * 7 % 101)
        assert torch.equal(batch.label, u / 2)
        assert torch.equal(batch.time, u + 1000)
        assert torch.equal(batch.categorical["kind"], u % 5)
        tags = batch.categorical["tags"]
        assert isinstance(tags, JaggedColumn)
        assert torch.equal(tags.lengths, u % 4)
        assert tags.values.tolist() == [t for n in u.tolist() for t in range(n, n + n % 4)]
        assert torch.equal(batch.floats, torch.stack([u * 3.0, -u.float()], dim=1))
        assert all(t.is_contiguous() for t in (batch.user, batch.item, batch.floats, tags.values))
        assert batch.position == seen
        assert batch.size == len(u)
        seen += len(u)
    assert seen == 249


def test_only_the_columns_that_are_asked_for(log):
    batch = next(iter(stream(log, StreamConfig(batch_size=4), columns=["item_id"])))
    assert batch.user is None
    assert batch.label is None
    assert batch.floats is None
    assert not batch.categorical
    assert len(batch.item) == batch.size == 4
    assert next(iter(stream(log, StreamConfig(batch_size=4)))).time is None
    with pytest.raises(InputError, match="no column 'colour'"):
        stream(log, StreamConfig(), columns=["colour"])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rate", [None, 0.3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_exactly_once_or_dropped_by_the_rule(log, world, rate, shuffle):
    threaded = [(1, 1), (4, 3)]
    for batch_size, buffer, (lanes, threads) in itertools.product([7, 64], [5, 1000], threaded):
        config = StreamConfig(
            batch_size=batch_size, buffer_rows=buffer, interleave=lanes, shuffle=shuffle, num_threads=threads
        )
        sample = None if rate is None else SampleConfig(rate=rate, seed=4)
        expected = set(range(249)) if sample is None else members(log, sample)
        found, lengths = [], set()
        for rank in range(world):
            part = stream(log, config, sample=sample, rank=rank, world=world)
            batches = users(part)
            assert len(batches) == len(part) == part.steps_per_epoch
            lengths.add(tuple(map(len, batches)))
            found += [user for batch in batches for user in batch]
        assert len(lengths) == 1  # all ranks: the same steps, of the same sizes
        assert len(found) == len(set(found)) == len(expected) - len(expected) % (world * batch_size) % world
        assert set(found) <= expected
    assert no_threads()


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 80),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([1.0, 0.5]),
    st.booleans(),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_stream_is_the_order_row_by_row(tmp_path_factory, files, world, batch_size, buffer, lanes, seed, rate, shuffle):
    """The threads give what the definition of the order says, for any log."""
    if sum(map(sum, files)) == 0:
        return
    log = make_log(tmp_path_factory.mktemp("log"), files)
    sample = SampleConfig(rate=rate, seed=seed)
    config = StreamConfig(
        batch_size=batch_size, buffer_rows=buffer, interleave=lanes, seed=seed, shuffle=shuffle, num_threads=2
    )
    expected = members(log, sample)
    if len(expected) < world:
        with pytest.raises(InputError, match="expected at least"):
            stream(log, config, sample=sample, world=world)
        return
    starts = np.cumsum([0] + [group.num_rows for group in log.train.groups])
    inside = [[u for u in range(starts[g], starts[g + 1]) if u in expected] for g in range(len(log.train.groups))]
    for rank in range(world):
        part = stream(log, config, sample=sample, rank=rank, world=world, epoch=seed)
        for step, batch in enumerate(users(part)):
            assert batch == [inside[g][row] for g, row in part.order.locate(step, rank, world).tolist()]


def test_steps_depend_on_the_global_batch_alone(log):
    def run(world):
        config = StreamConfig(batch_size=12 // world, buffer_rows=50, interleave=4)
        ranks = [users(stream(log, config, rank=rank, world=world, epoch=2)) for rank in range(world)]
        return [flat(parts) for parts in zip(*ranks, strict=True)]

    alone = run(1)
    for world in (2, 3, 4):
        assert run(world)[:-1] == alone[: 249 // 12]


def test_positions_are_the_places_in_the_global_order(log):
    alone = users(stream(log, StreamConfig(batch_size=12, buffer_rows=50)))
    order = flat(alone)
    for rank in range(3):
        for batch in stream(log, StreamConfig(batch_size=4, buffer_rows=50), rank=rank, world=3):
            if batch.step < 249 // 12:
                assert batch.user.tolist() == order[batch.position : batch.position + batch.size]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_at_any_step_and_on_other_ranks(log, shuffle):
    config = StreamConfig(batch_size=8, buffer_rows=30, interleave=3, shuffle=shuffle)
    whole = users(stream(log, config, epoch=5))
    for start in (0, 1, 2, 7, 15, 16, 30, 31, 32):
        rest = stream(log, config, epoch=5, start_step=start)
        assert len(rest) == len(whole) - start
        assert users(rest) == whole[start:]
    half = StreamConfig(batch_size=4, buffer_rows=30, interleave=3, shuffle=shuffle)
    ranks = [users(stream(log, half, epoch=5, start_step=9, rank=rank, world=2)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole[9 : 249 // 8]
    with pytest.raises(InputError, match="step 99 of epoch 5"):
        stream(log, config, epoch=5, start_step=99)


def test_epochs_differ_and_repeat(log):
    one = stream(log, StreamConfig(batch_size=16))
    first, again = users(one), users(one)
    one.set_epoch(1)
    second = users(one)
    assert first == again
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(249))
    assert users(stream(log, StreamConfig(batch_size=16, seed=1))) != first
    assert flat(users(stream(log, StreamConfig(batch_size=16, shuffle=False)))) == list(range(249))


def test_sample_does_not_depend_on_the_reader(log):
    sample = SampleConfig(rate=0.2, seed=3)
    expected = members(log, sample)
    for batch_size, shuffle, epoch in itertools.product([3, 50], [True, False], [0, 1]):
        config = StreamConfig(batch_size=batch_size, shuffle=shuffle, seed=epoch)
        assert set(flat(users(stream(log, config, sample=sample, epoch=epoch)))) == expected
    rest = flat(users(stream(log, StreamConfig(batch_size=9), sample=sample, complement=True)))
    assert sorted(expected | set(rest)) == list(range(249))
    assert len(expected) + len(rest) == 249


def test_a_tenth_of_the_rows(tmp_path):
    user = np.arange(200_000)
    pq.write_table(pa.table({"user_id": user, "item_id": user % 50}), tmp_path / "train.parquet", row_group_size=9000)
    log = open_log(tmp_path)
    part = InteractionStream(log.train, log.schema, StreamConfig(), sample=SampleConfig(rate=0.1))
    found = torch.cat([batch.user for batch in part])
    assert len(found) == part.num_rows
    assert abs(len(found) - 20_000) < 5 * np.sqrt(200_000 * 0.09)
    assert abs(found.double().mean() - 100_000) < 5 * 200_000 / np.sqrt(12 * 20_000)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_data_loader_workers(log, workers, world):
    config = StreamConfig(batch_size=11, buffer_rows=60)
    for rank in range(world):
        one = stream(log, config, rank=rank, world=world, start_step=1)
        loader = DataLoader(StreamDataset(one), batch_size=None, num_workers=workers)
        batches = list(loader)
        assert users(batches) == users(one)
        assert len(loader) == len(batches)
        tags = batches[0].categorical["tags"]
        assert torch.equal(tags.lengths, batches[0].user % 4)


@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_a_stream_is_pickled(log, bad):
    config = StreamConfig(batch_size=11, buffer_rows=60, on_bad_file=bad)
    one = stream(log, config, sample=SampleConfig(rate=0.7), start_step=1, epoch=2)
    read = users(one)
    other = pickle.loads(pickle.dumps(one))
    assert users(other) == read
    assert len(other) == len(one)
    other.set_epoch(3)
    assert users(other) != read
    assert users(pickle.loads(pickle.dumps(StreamDataset(one)))) == read


# ---- bad input, and the end of threads


def corrupt(tmp_path: Path, column: str, values: pa.Array) -> Log:
    """Forty rows in four row groups, a column replaced, in the second of two files."""
    (tmp_path / "train").mkdir()
    pq.write_table(table(0, 40), tmp_path / "train" / "a.parquet", row_group_size=10)
    bad = table(40, 40)
    bad = bad.set_column(bad.schema.get_field_index(column), column, values)
    pq.write_table(bad, tmp_path / "train" / "b.parquet", row_group_size=10, write_statistics=False)
    return open_log(tmp_path, SCHEMA)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rating", float("nan"), "NaN"),
        ("rating", None, "null"),
        ("kind", None, "null"),
        ("kind", -3, "id -3"),
    ],
)
def test_bad_values_are_named(tmp_path, column, value, message):
    values = table(40, 40).column(column).to_pylist()
    values[23] = value
    log = corrupt(tmp_path, column, pa.array(values))
    for shuffle in (True, False):
        with pytest.raises(InputError) as caught:
            list(stream(log, StreamConfig(batch_size=4, shuffle=shuffle)))
        for word in ("b.parquet", "row group 2", column, "row 3", message):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
    assert no_threads()


def test_an_id_beyond_the_vocabulary_is_named(tmp_path):
    log = make_log(tmp_path, [[10, 10]])
    columns = log.train.columns | {"user_id": replace(log.train.columns["user_id"], limit=15)}
    rows = replace(log.train, columns=columns)
    with pytest.raises(InputError, match=r"row group 1, column 'user_id', row 5: id 15 .* 15 ids"):
        list(InteractionStream(rows, SCHEMA, StreamConfig(batch_size=4)))


def test_a_file_that_goes_away_while_it_is_read(tmp_path):
    log = make_log(tmp_path, [[10], [10]])
    (tmp_path / "train" / "1.parquet").unlink()
    with pytest.raises(InputError, match=r"1\.parquet, row group 0"):
        list(stream(log, StreamConfig(batch_size=4)))
    assert no_threads()


def test_an_error_of_ours_names_the_row_group(log, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(type(log.train), "read", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        next(iter(stream(log, StreamConfig())))
    assert "row group" in caught.value.__notes__[0]
    assert no_threads()


def test_threads_end_when_the_consumer_stops(log):
    config = StreamConfig(batch_size=2, buffer_rows=4, interleave=2, num_threads=3)
    batches = iter(stream(log, config))
    next(batches)
    batches.close()
    assert no_threads()
    batches = iter(stream(log, config))
    next(batches)
    del batches
    assert no_threads()
    try:
        for _ in stream(log, config):
            raise RuntimeError("the consumer's own")
    except RuntimeError:
        pass
    gc.collect()
    assert no_threads()


def test_reading_ahead_is_bounded(tmp_path):
    """A consumer that stops early does not make the threads decode the whole log."""
    log = make_log(tmp_path, [[20] * 50])
    read = []
    original = type(log.train).read

    class Counted(type(log.train)):
        def read(self, group, columns):
            read.append(group)
            return original(self, group, columns)

    rows = Counted(log.train.filesystem, log.train.files, log.train.groups, log.train.columns)
    batches = iter(InteractionStream(rows, SCHEMA, StreamConfig(batch_size=4, buffer_rows=40, interleave=2)))
    next(batches)
    for _ in range(20):
        threading.Event().wait(0.01)
    batches.close()
    assert len(read) * 20 <= 40 + 2 * 20 + 2 * 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_threads": -1}, "num_threads"),
        ({"prefetch_batches": -1}, "prefetch_batches"),
        ({"interleave": -1}, "interleave"),
    ],
)
def test_bad_configuration(log, change, message):
    with pytest.raises(InputError, match=message):
        stream(log, StreamConfig(**change))


def test_more_ranks_than_rows(log):
    with pytest.raises(InputError, match="249 rows; expected at least 250"):
        stream(log, StreamConfig(batch_size=1), world=250)
    with pytest.raises(InputError, match="0 rows in what is not in"):
        stream(log, StreamConfig(), sample=SampleConfig(), complement=True)
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        stream(log, StreamConfig(), sample=SampleConfig(rate=0))
