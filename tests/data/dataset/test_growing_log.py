"""Which files of a log that grows are taken, and the rows of a round of them."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SampleConfig, Schema, StreamConfig, SynthConfig
from recpress.data.dataset.growing_log import GrowingLog, open_round, refuse_new_ids
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.bernoulli import membership
from recpress.data.sampling.corrupt_groups import TolerantSplit
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.interactions import synth

SCHEMA = Schema(time="time")


def write(path, first, rows=30, **columns):
    users = np.arange(first, first + rows) % 50
    base = {"user_id": users, "item_id": users % 7, "time": pa.array(np.arange(rows), pa.timestamp("ms"))}
    pq.write_table(pa.table(base | columns), path, row_group_size=10)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train-0.parquet", 0, 50)
    return tmp_path


def names(files):
    return [os.path.basename(file["name"]) for file in files]


def test_whole_files_are_taken_by_the_convention_of_logs(folder, caplog):
    growing = GrowingLog(str(folder))
    start = growing.new_files()
    assert names(start) == ["train-0.parquet"]
    (folder / "train").mkdir()
    for name in ("train-2.parquet", "train-1.parquet", "train/a.parquet", "train/_b.parquet", "train/.c.parquet"):
        write(folder / name, 0)
    for name in (".train-3.parquet", "test.parquet", "trainer.parquet", "train-4.parquet.tmp"):
        write(folder / name, 0)
    (folder / "train-5.parquet").write_bytes((folder / "train-1.parquet").read_bytes()[:-10])
    (folder / "train-6.parquet").touch()
    taken = {file["name"] for file in start}
    found = growing.new_files(taken)
    assert names(found) == ["train-1.parquet", "train-2.parquet", "a.parquet"]
    assert not caplog.records
    taken |= {file["name"] for file in found}
    for _ in range(3):
        assert growing.new_files(taken) == []
    said = [record.getMessage() for record in caplog.records]  # of each once, after it has not grown
    assert len(said) == 2
    assert f"{folder}/train-5.parquet: skipped for now, incomplete Parquet file" in said[0]
    write(folder / "train-5.parquet", 0)
    assert names(growing.new_files(taken)) == ["train-5.parquet"]


def test_a_glob_grows_too(folder):
    growing = GrowingLog(f"{folder}/day-*/*.parquet")
    assert growing.new_files() == []
    for day in ("day-1", "day-2"):
        (folder / day).mkdir()
        write(folder / day / "part.parquet", 0)
        write(folder / day / "_part.parquet", 0)
    assert [file["name"] for file in growing.new_files({f"{folder}/day-1/part.parquet"})] == [
        f"{folder}/day-2/part.parquet"
    ]


def test_what_cannot_grow_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"train-0.parquet: cannot be followed; expected a folder, or a glob"):
        GrowingLog(str(folder / "train-0.parquet"))
    made = synth(
        SynthConfig(users=30, items=60, rows=90, tastes=2, tastes_per_user=1, held_out_users=0), tmp_path / "x"
    )
    with pytest.raises(InputError, match=r"x: cannot be followed: its manifest.json lists all of its files"):
        GrowingLog(str(made))


def test_a_round_goes_on_with_the_ordinals_and_needs_no_older_file(folder):
    growing = GrowingLog(str(folder))
    log = open_log(folder, SCHEMA)
    rounds = [growing.new_files()]
    for number in (1, 2):
        write(folder / f"train-{number}.parquet", 10 * number)
        taken = {file["name"] for files in rounds for file in files}
        rounds.append(growing.new_files(taken))
    os.unlink(folder / "train-1.parquet")
    rows = open_round(log.train, rounds[0] + rounds[1], rounds[2])
    assert [(group.file, group.group) for group in rows.groups] == [(2, 0), (2, 1), (2, 2)]
    assert rows.where(rows.groups[0]) == f"{folder}/train-2.parquet, row group 0"
    sample = SampleConfig(rate=0.5, seed=3)
    stream = InteractionStream(rows, SCHEMA, StreamConfig(batch_size=4), sample=sample)
    want = [20 + 10 * group + int(row) for group in range(3) for row in membership(3, 0.5, 2, group, 10)]
    assert sorted(user for batch in stream for user in batch.user.tolist()) == want
    tolerant = TolerantSplit.of(log.train)
    assert open_round(tolerant, rounds[0] + rounds[1], rounds[2]).lost is tolerant.lost


def test_a_file_that_changed_or_does_not_fit_is_named(folder):
    log = open_log(folder, SCHEMA)
    growing = GrowingLog(str(folder))
    before = growing.new_files()

    def round_of(**columns):
        write(folder / "train-1.parquet", 0, **columns)
        return growing.new_files({file["name"] for file in before})

    files = round_of()
    write(folder / "train-1.parquet", 5)
    with pytest.raises(InputError, match=r"train-1.parquet: has changed since it was listed"):
        open_round(log.train, before, files)
    with pytest.raises(InputError, match=r"train-1.parquet, column 'item_id': type string; expected integers"):
        open_round(log.train, before, round_of(item_id=pa.array(["1"] * 30)))
    with pytest.raises(InputError, match=r"train-1.parquet, column 'time': timestamps in us .*cannot store it"):
        open_round(log.train, before, round_of(time=pa.array(np.arange(30), pa.timestamp("us"))))
    with pytest.raises(InputError, match=r"train-1.parquet, column 'time': numbers \(integer\)"):
        open_round(log.train, before, round_of(time=pa.array(np.arange(30))))
    rows = open_round(log.train, before, round_of(user_id=pa.array(np.arange(30) + 40), price=pa.nulls(30)))
    with pytest.raises(InputError, match=r"train-1.parquet, row group 1, column 'user_id', row 0: id 50 is outside"):
        list(InteractionStream(rows, SCHEMA, StreamConfig(batch_size=8, shuffle=False)))
    coarse = open_round(log.train, before, round_of(time=pa.array(np.arange(30), pa.timestamp("s"))))
    assert coarse.read(coarse.groups[0], ["time"])["time"].tolist() == [1000 * second for second in range(10)]


@pytest.mark.parametrize("statistics", [True, False])
def test_new_ids_are_refused_by_name_or_taken(folder, statistics):
    log = open_log(folder, SCHEMA)
    growing = GrowingLog(str(folder))
    before = growing.new_files()
    users = np.arange(30) + 40  # from row 10 on they are new
    times = pa.array(np.arange(30), pa.timestamp("ms"))
    new = pa.table({"user_id": users, "item_id": users % 7, "time": times})
    pq.write_table(new, folder / "train-1.parquet", row_group_size=10, write_statistics=statistics)
    files = growing.new_files({file["name"] for file in before})

    rows = open_round(log.train, before, files)
    refuse_new_ids(rows, {"item_id": "items may not"})  # there is none
    message = r"train-1.parquet, row group 1, column 'user_id', row 0: id 50 is outside the vocabulary of 50 ids; do so"
    with pytest.raises(InputError, match=message):
        refuse_new_ids(rows, {"item_id": "items may not", "user_id": "do so"})

    rows = open_round(log.train, before, files, any_id=["user_id"])
    refuse_new_ids(rows, {"user_id": "do so"})
    for sample in (None, SampleConfig(kind="user", rate=1.0)):
        stream = InteractionStream(rows, SCHEMA, StreamConfig(batch_size=8), sample=sample)
        assert sorted(user for batch in stream for user in batch.user.tolist()) == users.tolist()
