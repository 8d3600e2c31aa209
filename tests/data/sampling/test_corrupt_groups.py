"""Corrupt row groups and files that are skipped by choice: equal steps, the same sample, named once, counted."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.bernoulli import membership
from recpress.data.sampling.corrupt_groups import TRIES, TolerantSplit
from recpress.data.sampling.scan import iter_columns
from recpress.data.stream.loader import InteractionStream

GROUP, GROUPS, FILES = 20, 4, 3
ROWS = GROUP * GROUPS * FILES


def write_log(folder):
    """User k is row k of the log; three files of four row groups, without checksums, as most writers make them."""
    folder.mkdir(exist_ok=True)
    for number in range(FILES):
        users = np.arange(number * GROUP * GROUPS, (number + 1) * GROUP * GROUPS)
        tags = pa.array([[n, n + 1][: n % 3] for n in users.tolist()], pa.list_(pa.int64()))
        table = pa.table({"user_id": users, "item_id": users % 10, "tags": tags})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=GROUP)
    return folder


def damage(folder, file, group):
    """Overwrites the pages of a row group's users."""
    path = folder / f"train-{file}.parquet"
    chunk = pq.read_metadata(path).row_group(group).column(0)
    with open(path, "r+b") as target:
        target.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        target.write(b"\xff" * chunk.total_compressed_size)


def members(sample, file, group):
    first = (file * GROUPS + group) * GROUP
    return {first + int(row) for row in membership(sample.seed, sample.rate, file, group, GROUP)}


def stream(log, world=1, rank=0, sample=None, seed=0, **config):
    config = {"batch_size": 6, "buffer_rows": 50, "interleave": 3, "seed": seed, "on_bad_file": "skip"} | config
    return InteractionStream(log.train, log.schema, StreamConfig(**config), sample=sample, rank=rank, world=world)


SCHEMA = Schema(categorical=("tags",))


@given(
    bad=st.sets(st.tuples(st.integers(0, FILES - 1), st.integers(0, GROUPS - 1)), min_size=1, max_size=5),
    world=st.integers(1, 3),
    rate=st.sampled_from([1.0, 0.4]),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_steps_stay_equal_and_only_the_sample_stands_in(tmp_path_factory, bad, world, rate, seed):
    folder = write_log(tmp_path_factory.mktemp("log"))
    whole = open_log(folder, SCHEMA)
    sample = SampleConfig(rate=rate, seed=seed)
    quiet = [[(b.position, b.user.tolist()) for b in stream(whole, world, rank, sample, seed)] for rank in range(world)]
    for place in bad:
        damage(folder, *place)
    log = open_log(folder, SCHEMA)
    good = {u for f in range(FILES) for g in range(GROUPS) if (f, g) not in bad for u in members(sample, f, g)}
    for rank in range(world):
        one = stream(log, world, rank, sample, seed)
        batches = list(one)
        for batch in batches:
            assert batch.item.tolist() == [user % 10 for user in batch.user.tolist()]
            assert batch.categorical["tags"].lengths.tolist() == [user % 3 for user in batch.user.tolist()]
        found = [(batch.position, batch.user.tolist()) for batch in batches]
        assert [(place, len(users)) for place, users in found] == [(place, len(users)) for place, users in quiet[rank]]
        for (_, users), (_, before) in zip(found, quiet[rank], strict=True):
            assert all(now == then or then not in good for now, then in zip(users, before, strict=True))
            assert set(users) <= good
        assert set(one.rows.lost) <= bad
        middle = stream(log, world, rank, sample, seed)
        middle.set_epoch(0, len(found) // 2)
        assert [(b.position, b.user.tolist()) for b in middle] == found[len(found) // 2 :]


def test_a_file_is_named_once_and_its_row_groups_counted(tmp_path, caplog):
    write_log(tmp_path)
    for group in range(GROUPS):
        damage(tmp_path, 1, group)
    one = stream(open_log(tmp_path, SCHEMA))
    list(one)
    assert one.rows.lost == {(1, group): GROUP for group in range(GROUPS)}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith(f"skipping corrupt row group: {tmp_path}/train-1.parquet, row group ")
    assert "cannot be read" in said[0]


def test_stop_names_the_file(tmp_path):
    write_log(tmp_path)
    damage(tmp_path, 2, 1)
    with pytest.raises(InputError, match=r"train-2.parquet, row group 1: cannot be read"):
        list(stream(open_log(tmp_path, SCHEMA), on_bad_file="stop"))


def test_an_id_that_no_table_has_loses_its_row_group(tmp_path, caplog):
    write_log(tmp_path)
    table = pq.read_table(tmp_path / "train-0.parquet")
    users = table["user_id"].to_numpy().copy()
    users[25] = -1
    pq.write_table(table.set_column(0, "user_id", pa.array(users)), tmp_path / "train-0.parquet", row_group_size=GROUP)
    with pytest.raises(InputError, match="row group 1, column 'user_id', row 5: id -1"):
        open_log(tmp_path, SCHEMA)
    log = open_log(write_log(tmp_path / "good"), SCHEMA)
    os.replace(tmp_path / "train-0.parquet", tmp_path / "good" / "train-0.parquet")
    one = stream(log)
    list(one)
    assert set(one.rows.lost) == {(0, 1)}
    assert "row 5: id -1" in caplog.text


def test_it_gives_up_where_everything_fails(tmp_path):
    write_log(tmp_path)
    log = open_log(tmp_path, SCHEMA)
    for file in range(FILES):
        (tmp_path / f"train-{file}.parquet").unlink()
    one = stream(log)
    with pytest.raises(InputError, match=r"row group \d: cannot be read, and none that could stand in for it"):
        list(one)
    assert TRIES <= len(one.rows.lost) <= FILES * GROUPS


def test_whole_passes_leave_it_out(tmp_path):
    write_log(tmp_path)
    damage(tmp_path, 0, 2)
    rows = TolerantSplit.of(open_log(tmp_path, SCHEMA).train)
    users = [user for part in iter_columns(rows, ["user_id"]) for user in part["user_id"].tolist()]
    assert users == [user for user in range(ROWS) if not 40 <= user < 60]
    shared = InteractionStream(rows, SCHEMA, StreamConfig(on_bad_file="skip"))
    assert shared.rows.lost is rows.lost


def test_a_file_without_a_footer_keeps_its_place(tmp_path):
    write_log(tmp_path)
    sample = SampleConfig(rate=0.5, seed=2)
    quiet = {user for batch in stream(open_log(tmp_path, SCHEMA), sample=sample) for user in batch.user.tolist()}
    os.truncate(tmp_path / "train-1.parquet", 300)
    with pytest.raises(InputError, match=r"train-1.parquet: incomplete or not a Parquet file"):
        open_log(tmp_path, SCHEMA)
    log = open_log(tmp_path, SCHEMA, skip_bad=True)
    assert list(log.bad_files) == [f"{tmp_path}/train-1.parquet"]
    assert log.train.num_rows == ROWS - GROUP * GROUPS
    assert log.inputs()[1] == {"name": f"{tmp_path}/train-1.parquet", "size": 0, "rows": 0, "fingerprint": "left out"}
    found = {user for batch in stream(log, sample=sample) for user in batch.user.tolist()}
    assert found == {user for user in quiet if not 80 <= user < 160}
    other = open_log(
        tmp_path, SCHEMA, skip_bad=True, bad={f"{tmp_path}/train-2.parquet": "another rank cannot read it"}
    )
    assert other.train.num_rows == GROUP * GROUPS
    for number in (0, 2):
        os.truncate(tmp_path / f"train-{number}.parquet", 300)
    with pytest.raises(InputError, match=r"train-0.parquet: incomplete .*; none of the other 2 files"):
        open_log(tmp_path, SCHEMA, skip_bad=True)
    with pytest.raises(InputError) as error:
        open_log(tmp_path / "train-0.parquet", SCHEMA, skip_bad=True)
    assert "other" not in str(error.value)
