"""Raw values of any type: ids, numbers and times are exact, or refused with their row."""

import datetime as dt
import decimal
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.ingest.ingest_cases import (
    made,
    raw_rows,
    refused,
    write,
)

UUIDS = [uuid.UUID(int=7), uuid.UUID(int=2**127 + 1)]


IDS = {
    "uint64": (pa.array([2**64 - 1, 7], pa.uint64()), ["18446744073709551615", "7"]),
    "uint8": (pa.array([255, 7], pa.uint8()), [255, 7]),
    "decimal": (pa.array([decimal.Decimal("10.50"), decimal.Decimal("3.00")], pa.decimal128(9, 2)), ["10.5", "3"]),
    "decimal of integers": (pa.array([decimal.Decimal(10), decimal.Decimal(-3)], pa.decimal128(38, 0)), [10, -3]),
    "small decimal": (
        pa.array([decimal.Decimal("1E-8"), decimal.Decimal(0)], pa.decimal128(20, 10)),
        ["0.00000001", "0"],
    ),
    "decimal256": (
        pa.array([decimal.Decimal(10**50), decimal.Decimal("0.5")], pa.decimal256(60, 2)),
        [str(10**50), "0.5"],
    ),
    "extension": (
        pa.ExtensionArray.from_storage(pa.opaque(pa.int32(), "x", "y"), pa.array([9, 7], pa.int32())),
        [9, 7],
    ),
    "whole floats": (pa.array([1.0, 2.0]), [1, 2]),
    "dictionary": (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
    "digits as strings": (pa.array(["7", "8"]), ["7", "8"]),
    "string_view": (pa.array(["b", "a"], pa.string_view()), ["b", "a"]),
    "binary": (pa.array([b"ann", b"\xff\x00"], pa.binary()), ["ann", r"\xff00"]),
    "fixed binary": (pa.array([b"ann!", b"\xff\x00\x01\x02"], pa.binary(4)), ["ann!", r"\xff000102"]),
    "binary that looks escaped": (pa.array([rb"\xff", b"\xff"], pa.binary()), [r"\x5c786666", r"\xff"]),
    "uuid": (pa.array([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
    "boolean": (pa.array([True, False]), ["true", "false"]),
    "date": (pa.array([dt.date(2024, 1, 2), dt.date(1, 1, 1)]), ["2024-01-02", "0001-01-01"]),
}


@pytest.mark.parametrize("kind", IDS)
def test_types_of_ids(tmp_path, kind):
    column, expected = IDS[kind]
    source = write(tmp_path, a__parquet=pa.table({"user_id": column, "item_id": [1, 2]})) / "a.parquet"
    assert raw_rows(made(source, tmp_path)) == list(zip(expected, [1, 2], strict=True))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1.0, 2.5]), ["row 1", "2.5"]),
        (pa.array([1.0, 2.0**60]), ["row 1"]),
        (pa.array([1.0, float("nan")]), ["row 1", "no user_id"]),
        (pa.array([b"", b"a"]), ["row 0", "no user_id"]),
        (pa.array([[1], [2]]), ["type list"]),
        (pa.array([{"a": 1}] * 2), ["type struct"]),
    ],
)
def test_values_that_are_no_ids(tmp_path, column, words):
    source = write(tmp_path, a__parquet=pa.table({"user_id": column, "item_id": [1, 2]})) / "a.parquet"
    refused(source, tmp_path, "a.parquet", *words)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["5", "1700000002.5"], [5.0, 1700000002.5]),
        (["978300760", "-1"], [978300760, -1]),
        (["2024-01-01", "2024-01-03 10:00:00.5"], [dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 3, 10, 0, 0, 500000)]),
        (
            ["2024-01-01 00:00", "2024-01-01T00:00:00.000001"],
            [dt.datetime(2024, 1, 1), dt.datetime(2024, 1, 1, 0, 0, 0, 1)],
        ),
        (
            ["2024-01-01T05:30:00+05:30", "2024-01-01T00:00:01Z"],
            [dt.datetime(2024, 1, 1, 0, 0, k, tzinfo=dt.UTC) for k in (0, 1)],
        ),
    ],
)
@pytest.mark.parametrize("files", [1, 2])
def test_times_are_exact(tmp_path, times, expected, files):
    """Also where a later file needs a finer unit than the first."""
    rows = [f"{k},{k},{time}\n" for k, time in enumerate(times)]
    texts = ["".join(rows)] if files == 1 else rows
    source = write(tmp_path, **{f"in___{k}__csv": "user_id,item_id,t\n" + text for k, text in enumerate(texts)}) / "in"
    assert [row[2] for row in raw_rows(made(source, tmp_path, time="t"), "time")] == expected


def test_timestamps_keep_their_unit(tmp_path):
    fine = pa.table({"user_id": [1], "item_id": [1], "t": pa.array([1700000000123456789], pa.timestamp("ns"))})
    coarse = pa.table({"user_id": [1], "item_id": [2], "t": pa.array([1700000000], pa.timestamp("s"))})
    source = write(tmp_path, in___a__parquet=coarse, in___b__parquet=fine) / "in"
    made(source, tmp_path, time="t")
    column = pq.read_table(tmp_path / "out/train").column("time")
    assert column.type == pa.timestamp("ns")
    assert column.cast(pa.int64()).to_pylist() == [1700000000000000000, 1700000000123456789]


LABELS = {
    "decimal": (
        pa.array([decimal.Decimal("3.000"), decimal.Decimal("0.100")], pa.decimal128(6, 3)),
        [3.0, np.float32(0.1)],
    ),
    "boolean": (pa.array([True, False]), [1.0, 0.0]),
    "text": (pa.array(["5.0", " 3.5 "]), [5.0, 3.5]),
    "half": (pa.array([5.0, 0.5], pa.float16()), [5.0, 0.5]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(tmp_path, kind):
    column, expected = LABELS[kind]
    source = write(tmp_path, a__parquet=pa.table({"user_id": [1, 2], "item_id": [1, 2], "r": column})) / "a.parquet"
    assert [row[2] for row in raw_rows(made(source, tmp_path, label="r"), "label")] == expected


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1.0, float("inf")]), ["row 1", "inf"]),
        (pa.array([1e300, 1.0]), ["row 0", "1e+300"]),
        (pa.array(["5", "good"]), ["row 1", "good"]),
        (pa.array(["5", "4,5"]), ["row 1", "4,5"]),
        (pa.array([1, None]), ["row 1", "no label"]),
        (pa.array([[1.0], [2.0]]), ["type list"]),
    ],
)
@pytest.mark.parametrize("role", ["label", "floats"])
def test_values_that_are_no_numbers(tmp_path, column, words, role):
    source = write(tmp_path, a__parquet=pa.table({"user_id": [1, 2], "item_id": [1, 2], "r": column})) / "a.parquet"
    if role == "floats" and column.null_count:
        assert np.isnan(raw_rows(made(source, tmp_path, floats=("r",)), "r")[1][2])
    else:
        refused(source, tmp_path, "a.parquet", *words, **{role: "r" if role == "label" else ("r",)})
