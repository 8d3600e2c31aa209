"""Ids, times and features over all files of a log."""

import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from tests.data.ingest.ingest_cases import (
    HEAD,
    made,
    raw_rows,
    refused,
    write,
)


def test_ids_with_leading_zeros_stay_strings(tmp_path):
    source = write(tmp_path, a__csv=HEAD + "007,0001\n7,1\n0007,01\n") / "a.csv"
    assert raw_rows(made(source, tmp_path)) == [("007", "0001"), ("7", "1"), ("0007", "01")]


def test_the_kind_of_ids_is_decided_over_all_files(tmp_path):
    source = write(tmp_path, in___a__csv=HEAD + "1,10\n2,20\n1,20\n", in___b__csv=HEAD + "1,B00X\n007,10\n") / "in"
    log = made(source, tmp_path)
    assert raw_rows(log) == [("1", "10"), ("2", "20"), ("1", "20"), ("1", "B00X"), ("007", "10")]
    assert log.counts("item").tolist() == [2, 2, 1]
    assert log.vocabulary("user").column("raw").to_pylist() == ["1", "2", "007"]


def test_integer_type_on_demand(tmp_path):
    source = write(tmp_path, a__csv=HEAD + "007,0001\n7,1\n") / "a.csv"
    assert raw_rows(made(source, tmp_path, id_type="int")) == [(7, 1), (7, 1)]
    log = open_log(ingest(IngestConfig(input=str(source), id_type="string"), tmp_path / "strings"))
    assert raw_rows(log) == [("007", "0001"), ("7", "1")]


def test_ids_written_as_floats_and_integers(tmp_path):
    refused(write(tmp_path, a__csv=HEAD + "1.0,5\n2,6\n") / "a.csv", tmp_path, "a.csv", "line 2", "'1.0'")
    source = write(tmp_path, in___a__csv=HEAD + "1,5\n", in___b__csv=HEAD + "1.0,5\n") / "in"
    refused(source, tmp_path, "b.csv", "line 2", "'1.0'")
    log = made(write(tmp_path, c__csv=HEAD + "1.0,5\n2.5,6\n") / "c.csv", tmp_path)
    assert raw_rows(log) == [("1.0", 5), ("2.5", 6)]


def test_extending_keeps_the_kind_of_the_vocabulary(tmp_path):
    old = ingest(IngestConfig(input=str(write(tmp_path, a__csv=HEAD + "anna,1\n007,2\n") / "a.csv")), tmp_path / "old")
    new = write(tmp_path, b__csv=HEAD + "7,1\n007,2\n") / "b.csv"
    assert raw_rows(made(new, tmp_path, extend=str(old))) == [("7", 1), ("007", 2)]
    log = open_log(tmp_path / "out")
    assert pq.read_table(tmp_path / "out/train").column("user_id").to_pylist() == [2, 1]
    assert log.num_users == 3
    typed = write(tmp_path, c__parquet=pa.table({"user_id": [7, 8], "item_id": [1, 2]})) / "c.parquet"
    log = open_log(ingest(IngestConfig(input=str(typed), extend=str(tmp_path / "out")), tmp_path / "more"))
    assert raw_rows(log) == [("7", 1), ("8", 2)]
    assert pq.read_table(tmp_path / "more/train").column("user_id").to_pylist() == [2, 3]


def test_an_integer_vocabulary_refuses_other_ids(tmp_path):
    old = ingest(IngestConfig(input=str(write(tmp_path, a__csv=HEAD + "1,1\n") / "a.csv")), tmp_path / "old")
    for number, bad in enumerate(("u9", "001", "1.0", "9" * 20)):
        source = write(tmp_path, **{f"b{number}__csv": HEAD + f"1,1\n{bad},1\n"}) / f"b{number}.csv"
        with pytest.raises(InputError, match=rf"b{number}\.csv, column 'user_id', line 3: id '{bad}'"):
            ingest(IngestConfig(input=str(source), extend=str(old)), tmp_path / "out")
    with pytest.raises(InputError, match="kind 'int'"):
        ingest(IngestConfig(input=str(source), extend=str(old), id_type="string"), tmp_path / "out")


def test_ids_of_two_types(tmp_path):
    ints, text = pa.table({"user_id": [1], "item_id": [1]}), pa.table({"user_id": ["1"], "item_id": [1]})
    source = write(tmp_path, in___a__parquet=ints, in___b__parquet=text) / "in"
    refused(source, tmp_path, "a.parquet", "b.parquet", "user_id", "text", "number")


DAY = dt.datetime(2024, 1, 1)


DATES = ["2024-01-01 00:00:00", "2024-01-02 00:00:00"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DATES, ["1704672000", "1704758400"]),
        (["1704672000", "1704758400"], DATES),
        (DATES, ["2024-01-03T00:00:00Z", "2024-01-04T00:00:00Z"]),
    ],
)
def test_times_of_two_kinds(tmp_path, first, second):
    def text(times):
        return "user_id,item_id,t\n" + "".join(f"{k},{k},{time}\n" for k, time in enumerate(times))

    source = write(tmp_path, in___a__csv=text(first), in___b__csv=text(second)) / "in"
    refused(source, tmp_path, "a.csv", "b.csv", "time", time="t")
    source = write(tmp_path, c__csv=text([*first, *second])) / "c.csv"
    refused(source, tmp_path, "c.csv", "line 2", "line 4", time="t")


def test_numbers_that_span_all_magnitudes_are_no_mix_of_units(tmp_path):
    ticks = [10**power for power in range(14)]
    source = write(tmp_path, a__csv="user_id,item_id,t\n" + "".join(f"1,{k},{t}\n" for k, t in enumerate(ticks)))
    assert [row[2] for row in raw_rows(made(source / "a.csv", tmp_path, time="t"), "time")] == ticks


@pytest.mark.parametrize("scale", [1000, 10**6, 10**9])
def test_times_in_seconds_and_finer(tmp_path, scale):
    def text(times):
        return "user_id,item_id,t\n" + "".join(f"{k},{k},{time}\n" for k, time in enumerate(times))

    first, second = [1704067200, 1704153600], [1704240000 * scale, 1704326400 * scale]
    source = write(tmp_path, in___a__csv=text(first), in___b__csv=text(second)) / "in"
    refused(source, tmp_path, "a.csv", "b.csv", "time", "seconds since 1970", time="t")
    mixed = write(tmp_path, e__csv=text([0, *first, *second])) / "e.csv"
    refused(mixed, tmp_path, "e.csv", "seconds since 1970 in line 3", "in line 5", "one unit", time="t")
    log = made(write(tmp_path, d__csv=text([0, -1, 5, *second])) / "d.csv", tmp_path, time="t")
    assert [row[2] for row in raw_rows(log, "time")] == [0, -1, 5, *second]


def test_lists_and_views(tmp_path):
    lists = pa.array([["a", "b"], [], None, ["b"]], pa.list_view(pa.string_view()))
    table = pa.table({"user_id": [1, 2, 3, 4], "item_id": [1, 2, 3, 4], "tags": lists})
    made(write(tmp_path, a__parquet=table) / "a.parquet", tmp_path, categorical=("tags",))
    assert pq.read_table(tmp_path / "out/train").column("tags").to_pylist() == [[0, 1], [], [], [1]]


def test_features_whose_names_are_alike_have_files_of_their_own(tmp_path):
    source = write(tmp_path, a__csv="user_id,item_id,a/b,a_b,a%2Fb\n1,1,x,y,z\n") / "a.csv"
    log = made(source, tmp_path, categorical=("a/b", "a_b", "a%2Fb"))
    names = {name: entry["vocabulary"] for name, entry in log.manifest["features"].items()}
    found = [pq.read_table(tmp_path / "out" / file).column("raw").to_pylist() for file in names.values()]
    assert found == [["x"], ["y"], ["z"]]
