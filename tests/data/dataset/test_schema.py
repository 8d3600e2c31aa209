"""Files of one log that differ in how they store the same: read as one, or refused by name."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recpress.data.config import Schema
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.split import leave_one_out
from recpress.data.sampling.scan import iter_columns

SCHEMA = Schema(label="label", time="time", categorical=("kind", "tags"), floats=("price",))
INTEGERS = (pa.int16(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64())
KINDS = {
    "user_id": [*INTEGERS, pa.dictionary(pa.int32(), pa.int64()), pa.dictionary(pa.int8(), pa.uint32())],
    "item_id": [*INTEGERS, pa.dictionary(pa.int16(), pa.int32())],
    "label": [pa.bool_(), pa.int8(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(9, 2)],
    "time": [pa.timestamp(unit, "UTC") for unit in ("s", "ms", "us", "ns")],
    "kind": [*INTEGERS, pa.dictionary(pa.int8(), pa.int64())],
    "tags": [pa.list_(pa.int8()), pa.list_(pa.int64()), pa.large_list(pa.uint32()), pa.list_(pa.int32(), 2)],
    "price": [pa.int32(), pa.float32(), pa.float64(), pa.decimal128(12, 3), pa.dictionary(pa.int8(), pa.float32())],
}


def rows(first, count):
    """Values that every type of KINDS can hold."""
    number = np.arange(first, first + count)
    return {
        "user_id": pa.array(number % 7),
        "item_id": pa.array(number % 11),
        "label": pa.array(number % 2),
        "time": pa.array(number * 1000, pa.timestamp("s", "UTC")),
        "kind": pa.array(number % 5),
        "tags": pa.array([[n % 3, n % 4] for n in number.tolist()], pa.list_(pa.int64())),
        "price": pa.array((number % 100).astype(np.float64)),
    }


def as_type(array, kind):
    if pa.types.is_dictionary(kind):
        return array.cast(kind.value_type).dictionary_encode().cast(kind)
    if kind == pa.float16():
        return pa.array(array.to_numpy().astype(np.float16))
    if pa.types.is_decimal(kind):
        return array.cast(pa.int64()).cast(pa.decimal128(19)).cast(kind)
    return array.cast(kind)


def read(folder, schema=SCHEMA):
    log = open_log(folder, schema)
    parts = list(iter_columns(log.train, list(log.train.columns)))
    found = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        assert len({(type(c), c.values.dtype if isinstance(c, Jagged) else c.dtype) for c in columns}) == 1
        lists = isinstance(columns[0], Jagged)
        found[name] = [
            value
            for c in columns
            for value in (
                [c.values[a:b].tolist() for a, b in zip(c.offsets, c.offsets[1:], strict=False)]
                if lists
                else c.tolist()
            )
        ]
    return found


def file_of(draw, first, count):
    names = draw(st.permutations(list(KINDS)))
    values = rows(first, count)
    fields, arrays = [], []
    for name in names:
        array = as_type(values[name], draw(st.sampled_from(KINDS[name])))
        fields.append(pa.field(name, array.type, nullable=draw(st.booleans())))
        arrays.append(array)
    if draw(st.booleans()):
        fields.append(pa.field("not in the schema", pa.string()))
        arrays.append(pa.array(["x"] * count))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_log_with_drift_is_the_log_without(tmp_path_factory, data, sizes):
    plain, drifting = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("drifting")
    first, units = 0, []
    for number, size in enumerate(sizes):
        table = file_of(data.draw, first, size)
        pq.write_table(table, drifting / f"train-{number}.parquet", row_group_size=7, version="2.6")
        pq.write_table(pa.table(rows(first, size)), plain / f"train-{number}.parquet")
        units.append(pq.read_schema(drifting / f"train-{number}.parquet").field("time").type.unit)
        first += size
    want, found = read(plain), read(drifting)
    coarse = open_log(plain, SCHEMA).train.columns["time"].time.split()[1]
    fine = max(units, key=("s", "ms", "us", "ns").index)
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    want["time"] = [time * factor[fine] // factor[coarse] for time in want["time"]]
    assert found == want


def two_files(tmp_path, name, one, other, part="train-1"):
    """A log whose column has `one` in the first file and `other` in the second (None: none)."""
    for file, column in (("train-0", one), (part, other)):
        table = pa.table(rows(0, 3))
        place = table.schema.get_field_index(name)
        table = table.remove_column(place) if column is None else table.set_column(place, name, column)
        pq.write_table(table, tmp_path / f"{file}.parquet")


UTC = pa.array([1, 2, 3], pa.timestamp("ms", "UTC"))
LOCAL = pa.array([1, 2, 3], pa.timestamp("ms"))
NUMBERS = pa.array([1, 2, 3])
WORDS = pa.array(["1", "2", "3"]).dictionary_encode()


@pytest.mark.parametrize(
    ("name", "one", "other", "says"),
    [
        ("price", None, NUMBERS, r"train-0.parquet: no column 'price', which .*train-1.parquet has"),
        ("price", NUMBERS, None, r"train-1.parquet: no column 'price', which .*train-0.parquet has"),
        ("tags", None, None, r"train-0.parquet: no column 'tags'; expected integers, or lists.*found user_id"),
        ("kind", NUMBERS, pa.array([[1], [2], [3]]), r"train-1.*'kind': type list.*, but int64 in .*train-0"),
        ("kind", NUMBERS, pa.array(["1", "2", "3"]), r"train-1.*'kind': type string; expected integers"),
        ("item_id", NUMBERS, WORDS, r"train-1.*'item_id': type dictionary<values=string"),
        ("user_id", NUMBERS, pa.array([1.0, 2.0, 3.0]), r"train-1.*'user_id': type double; expected integers"),
        ("time", NUMBERS, UTC, r"train-1.*'time': timestamps in ms \(with .*, but numbers \(integer\) in .*train-0"),
        ("time", UTC, LOCAL, r"train-1.*without a time zone\), but timestamps in ms \(with"),
        ("time", pa.array([1.5, 2, 3]), LOCAL, r"train-1.*timestamps in ms .*, but numbers \(float\) in"),
    ],
)  # fmt: skip
def test_what_has_no_one_meaning_is_refused_by_name(tmp_path, name, one, other, says):
    two_files(tmp_path, name, one, other)
    with pytest.raises(InputError, match=says):
        open_log(tmp_path, SCHEMA)


def test_a_column_that_no_schema_names_may_come_and_go(tmp_path):
    two_files(tmp_path, "price", NUMBERS, None)
    assert "price" not in read(tmp_path, Schema(label="label"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.table(rows(0, 3))
    pq.write_table(table.append_column("price", NUMBERS), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train.parquet: 2 columns 'price'"):
        open_log(tmp_path, SCHEMA)


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        (NUMBERS, pa.array([0.5, 1.0, 2.0]), [1.0, 2.0, 3.0, 0.5, 1.0, 2.0]),
        (LOCAL, pa.array([datetime.date(1970, 1, 2)] * 3), [1, 2, 3] + [86_400_000] * 3),
        (pa.array([1, 2, 3], pa.timestamp("us")), LOCAL, [1, 2, 3, 1000, 2000, 3000]),
        (LOCAL, pa.array([1, 2, 3], pa.timestamp("us")), [1000, 2000, 3000, 1, 2, 3]),
    ],
)
def test_times_come_in_the_finest_unit(tmp_path, one, other, want):
    two_files(tmp_path, "time", one, other)
    assert read(tmp_path)["time"] == want


def test_times_of_held_out_rows_are_in_the_unit_of_train(tmp_path):
    two_files(tmp_path, "time", LOCAL, pa.array([1, 2, 3], pa.timestamp("us")), part="test")
    log = open_log(tmp_path, SCHEMA)
    assert next(iter_columns(log.train, ["time"]))["time"].tolist() == [1000, 2000, 3000]
    two_files(tmp_path, "time", LOCAL, NUMBERS, part="test")
    with pytest.raises(InputError, match=r"test.parquet, column 'time': numbers \(integer\), but timestamps in ms"):
        open_log(tmp_path, SCHEMA)


def test_a_time_that_the_finest_unit_cannot_hold_is_named(tmp_path):
    far = pa.array([2**60, 2, 3], pa.timestamp("ms"))
    two_files(tmp_path, "time", far, pa.array([1, 2, 3], pa.timestamp("ns")))
    with pytest.raises(InputError, match=r"train-0.parquet, row group 0, column 'time': Casting .* out of bounds"):
        read(tmp_path)


def test_a_writer_that_met_no_value(tmp_path):
    """pandas writes a column of missing floats, and Arrow one of empty lists, without a type."""
    two_files(tmp_path, "price", NUMBERS, pa.nulls(3))
    assert np.isnan(read(tmp_path)["price"][3:]).all()
    two_files(tmp_path, "tags", pa.array([[1], [2], []]), pa.array([[], [], []]))
    assert read(tmp_path)["tags"] == [[1], [2], [], [], [], []]
    two_files(tmp_path, "tags", pa.array([[1], [2], []]), pa.array([[], [None], []]))
    with pytest.raises(InputError, match="row 1: a null in the list"):
        read(tmp_path)


def test_a_split_of_a_drifting_log(tmp_path):
    (tmp_path / "log").mkdir()
    for number, kind in enumerate((pa.int32(), pa.uint64(), pa.dictionary(pa.int8(), pa.int16()))):
        table = pa.table(rows(number * 30, 30)).select(["item_id", "user_id", "time"])
        table = table.set_column(0, "item_id", pa.array(np.arange(number * 30, number * 30 + 30)))
        table = table.set_column(0, "item_id", as_type(table["item_id"].combine_chunks(), kind))
        table = table.set_column(2, "time", table["time"].cast(pa.timestamp("us" if number else "ms", "UTC")))
        pq.write_table(
            table.select([number % 3, (number + 1) % 3, (number + 2) % 3]), tmp_path / f"log/train-{number}.parquet"
        )
    drifting = open_log(tmp_path / "log", Schema(time="time"))
    log = open_log(leave_one_out(drifting, tmp_path / "out", by="last", negatives=0))
    held = next(iter_columns(log.test, ["user_id", "item_id"]))
    last = {n % 7: n for n in range(90)}
    assert dict(zip(held["user_id"].tolist(), held["item_id"].tolist(), strict=True)) == last
    assert log.train.num_rows == 90 - 7
