"""Files as users have them: each is read as it is written, or refused in one line that names the place."""

import bz2
import datetime as dt
import decimal
import gzip
import json
import uuid
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest

HEAD = "user_id,item_id\n"


def write(folder, **files):
    """Files by name, with `__` for a dot and `DIR___` for a folder; text, bytes, or a table for Parquet."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def made(source, tmp_path, **options):
    return open_log(ingest(IngestConfig(input=str(source), **options), tmp_path / "out"))


def raw_rows(log, *columns, part="train"):
    """Rows with raw ids, and further columns as they are stored."""
    table = pq.read_table(f"{log.path}/{part}")
    sides = []
    for side in ("user", "item"):
        raw = log.vocabulary(side).column("raw").to_pylist()
        sides.append([raw[k] for k in table.column(f"{side}_id").to_pylist()])
    return list(zip(*sides, *(table.column(name).to_pylist() for name in columns), strict=True))


def refused(source, tmp_path, *words, **options):
    with pytest.raises(InputError) as error:
        ingest(IngestConfig(input=str(source), **options), tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


# Text: the delimiter, quotes, lines, the encoding


def test_tsv_without_quoting_keeps_stray_quotes(tmp_path):
    names = ['"Heroes"', '"die band', "plain", '12" mix', 'the end"', "last"]
    text = "".join(f"u{k}\ti{k}\t{name}\n" for k, name in enumerate(names))
    source = write(tmp_path, a__tsv="user_id\titem_id\tname\n" + text) / "a.tsv"
    log = made(source, tmp_path, categorical=("name",))
    assert raw_rows(log) == [(f"u{k}", f"i{k}") for k in range(6)]
    kept = pq.read_table(tmp_path / "out/vocabulary/feature-name.parquet").column("raw").to_pylist()
    assert kept == names


def test_csv_with_quotes_that_are_none(tmp_path):
    for text, line in (('1,"a"b\n2,c\n', "line 2"), ('1,2\n3,"4\n', "line 3"), ('1,"2\n3"x\n4,"5"\n', "line 2")):
        source = write(tmp_path, a__csv=HEAD + text) / "a.csv"
        refused(source, tmp_path, "a.csv", line, "--quoting off")
    log = made(write(tmp_path, a__csv=HEAD + '1,"a"b\n2,c"\n') / "a.csv", tmp_path, quoting="off")
    assert raw_rows(log) == [(1, '"a"b'), (2, 'c"')]


def test_quotes_are_checked_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("recpress.data.ingest.raw_text.BLOCK", 64)
    rows = [(f"u{k}", ["x", 'a "quoted", b', "two\nlines", ""][k % 4] + str(k)) for k in range(200)]
    text = HEAD + "".join(f'{u},"{i.replace(chr(34), chr(34) * 2)}"\n' for u, i in rows)
    assert raw_rows(made(write(tmp_path, a__csv=text) / "a.csv", tmp_path)) == rows
    bad = write(tmp_path / "bad", b__csv=text + 'u,"x"y\n')
    refused(bad / "b.csv", bad, "b.csv", "closing quote")


@pytest.mark.parametrize(
    "text",
    [
        "user_id;item_id\n1;10\n2;20\n",
        "user_id|item_id\n1|10\n2|20\n",
        "user_id\titem_id\n1\t10\n2\t20\n",
        '"user_id";"item_id"\n"1";"10"\n"2";"20"\n',
        "user_id, item_id, note\n1, 10, a\n2, 20, b\n",
        "\ufeffuser_id,item_id\r\n1,10\r\n2,20\r\n\r\n\r\n",
        "\n\nuser_id,item_id\n1,10\n\n2,20",
        "item_id,x,user_id\n10,\x85,1\n20,\u2028,2\n",
        "user_id,item_id\r1,10\r2,20\r",
    ],
)
def test_ways_to_write_csv(tmp_path, text):
    log = made(write(tmp_path, a__csv=text) / "a.csv", tmp_path)
    assert raw_rows(log) == [(1, 10), (2, 20)]


def test_delimiter_encoding_and_null_values_are_options(tmp_path):
    text = "user_id#item_id#city#price\nJosé#1#München#-\nNA#2#-#2.5\n"
    source = write(tmp_path, a__csv=text.encode("latin-1")) / "a.csv"
    refused(source, tmp_path, "row 0", "user_id", "--encoding", delimiter="#")
    refused(source, tmp_path, "encoding", "klingon", encoding="klingon")
    refused(source, tmp_path, "delimiter", delimiter="##")
    options = {"delimiter": "#", "encoding": "latin-1", "null_values": ("-",)}
    log = made(source, tmp_path, categorical=("city",), floats=("price",), **options)
    assert raw_rows(log) == [("José", 1), ("NA", 2)]
    assert pq.read_table(tmp_path / "out/vocabulary/feature-city.parquet").column("raw").to_pylist() == ["München", ""]
    assert np.isnan(pq.read_table(tmp_path / "out/train").column("price").to_pylist()[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_byte_order_mark(tmp_path, encoding):
    source = write(tmp_path, a__csv=(HEAD + "é,1\n").encode(encoding)) / "a.csv"
    assert raw_rows(made(source, tmp_path)) == [("é", 1)]


def test_tsv_with_quotes(tmp_path):
    source = write(tmp_path, a__tsv='"user_id"\t"item_id"\n"a"\t1\n') / "a.tsv"
    refused(source, tmp_path, "a.tsv", "--quoting on")
    assert raw_rows(made(source, tmp_path, quoting="on")) == [("a", 1)]


def test_files_without_rows_have_no_types(tmp_path):
    empty = pa.table({"user_id": pa.array([], pa.float64()), "item_id": pa.array([], pa.null())})
    full = pa.table({"user_id": ["a"], "item_id": [1]})
    source = write(tmp_path, in___a__parquet=empty, in___b__parquet=full, in___c__parquet=empty) / "in"
    assert raw_rows(made(source, tmp_path)) == [("a", 1)]


def test_columns_of_one_name(tmp_path):
    source = write(tmp_path, a__csv="user_id,item_id,item_id\n1,4,7\n") / "a.csv"
    refused(source, tmp_path, "a.csv", "2 columns 'item_id'")
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["user_id", "item_id", "item_id"])
    refused(write(tmp_path, b__parquet=table) / "b.parquet", tmp_path, "b.parquet", "2 columns 'item_id'")
    source = write(tmp_path, c__json='{"user_id": 1, "item_id": 2, "item_id": 3}\n') / "c.json"
    refused(source, tmp_path, "c.json, row 0", "item_id", "twice")
    other = pa.Table.from_arrays([pa.array([1])] * 4, names=["user_id", "item_id", "x", "x"])
    assert raw_rows(made(write(tmp_path, d__parquet=other) / "d.parquet", tmp_path)) == [(1, 1)]


def test_flat_columns_with_dots(tmp_path):
    table = pa.table({"item_id.x": [5, 6], "user_id": [1, 2], "item_id": [3, 4]})
    assert raw_rows(made(write(tmp_path, a__parquet=table) / "a.parquet", tmp_path)) == [(1, 3), (2, 4)]


# Ids: what is written differently is different


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
    refused(write(tmp_path, a__csv=HEAD + "1.0,5\n2,6\n") / "a.csv", tmp_path, "a.csv", "row 0", "'1.0'")
    source = write(tmp_path, in___a__csv=HEAD + "1,5\n", in___b__csv=HEAD + "1.0,5\n") / "in"
    refused(source, tmp_path, "b.csv", "row 0", "'1.0'")
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
        with pytest.raises(InputError, match=rf"b{number}\.csv, column 'user_id', row 1: id '{bad}'"):
            ingest(IngestConfig(input=str(source), extend=str(old)), tmp_path / "out")
    with pytest.raises(InputError, match="kind 'int'"):
        ingest(IngestConfig(input=str(source), extend=str(old), id_type="string"), tmp_path / "out")


UUIDS = [uuid.UUID(int=7), uuid.UUID(int=2**127 + 1)]
IDS = {
    "uint64": (pa.array([2**64 - 1, 7], pa.uint64()), ["18446744073709551615", "7"]),
    "uint8": (pa.array([255, 7], pa.uint8()), [255, 7]),
    "decimal": (pa.array([decimal.Decimal("10.50"), decimal.Decimal("3.00")], pa.decimal128(9, 2)), ["10.5", "3"]),
    "decimal of integers": (pa.array([decimal.Decimal(10), decimal.Decimal(-3)], pa.decimal128(38, 0)), [10, -3]),
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


def test_ids_of_two_types(tmp_path):
    ints, text = pa.table({"user_id": [1], "item_id": [1]}), pa.table({"user_id": ["1"], "item_id": [1]})
    source = write(tmp_path, in___a__parquet=ints, in___b__parquet=text) / "in"
    refused(source, tmp_path, "a.parquet", "b.parquet", "user_id", "text", "number")


# Times and labels


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
    refused(source, tmp_path, "c.csv", "row 0", "row 2", time="t")


@pytest.mark.parametrize("scale", [1000, 10**6, 10**9])
def test_times_in_seconds_and_finer(tmp_path, scale):
    def text(times):
        return "user_id,item_id,t\n" + "".join(f"{k},{k},{time}\n" for k, time in enumerate(times))

    first, second = [1704067200, 1704153600], [1704240000 * scale, 1704326400 * scale]
    source = write(tmp_path, in___a__csv=text(first), in___b__csv=text(second)) / "in"
    refused(source, tmp_path, "a.csv", "b.csv", "time", "seconds since 1970", time="t")
    log = made(write(tmp_path, d__csv=text([0, -1, 5, *second])) / "d.csv", tmp_path, time="t")
    assert [row[2] for row in raw_rows(log, "time")] == [0, -1, 5, *second]


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


# JSON lines


def test_json_lines(tmp_path):
    rows = [
        {"u": "A1", "i": "007", "r": 5, "t": 1387670400, "tags": ["x", "y"], "extra": {"deep": [1]}},
        {"t": 1387670401, "r": 2.5, "i": "é\n\u2028", "u": "A2"},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=k == 0) for k, row in enumerate(rows)) + "\r\n\r\n"
    source = write(tmp_path, a__jsonl=text) / "a.jsonl"
    log = made(source, tmp_path, user="u", item="i", label="r", time="t", categorical=("tags",))
    assert raw_rows(log, "label", "time", "tags") == [
        ("A1", "007", 5.0, 1387670400, [0, 1]),
        ("A2", "é\n\u2028", 2.5, 1387670401, []),
    ]


def test_json_integers_are_exact(tmp_path):
    ids = [2**53 + 1, 2**63, -1, 10**30]
    text = "".join(json.dumps({"user_id": k, "item_id": 1}) + "\n" for k in ids)
    source = write(tmp_path, a__json=text) / "a.json"
    assert [row[0] for row in raw_rows(made(source, tmp_path))] == [str(k) for k in ids]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"user_id": "1", "item_id": 2}', ["row 1", "user_id", "string", "number"]),
        ('{"user_id": 1.5, "item_id": 2}', ["row 1", "1.5"]),
        ('{"user_id": 1e400, "item_id": 2}', ["row 1", "inf"]),
        ('{"user_id": true, "item_id": 2}', ["row 1", "boolean"]),
        ('{"user_id": {"a": 1}, "item_id": 2}', ["row 1", "object", "number", "row 0"]),
        ('{"user_id": null, "item_id": 2}', ["row 1", "no user_id"]),
        ('{"item_id": 2}', ["row 1", "no user_id"]),
        ('{"user_id": 1, "item_id"', ["row 1", "JSON"]),
        ("[1, 2]", ["row 1", "JSON"]),
        ("[" * 100000, ["row 1"]),
        ('{"user_id": ' + "9" * 5000 + ', "item_id": 2}', ["row 1"]),
    ],
)
def test_json_lines_that_cannot_be_used(tmp_path, line, words):
    source = write(tmp_path, a__json='{"user_id": 1, "item_id": 2}\n' + line + "\n") / "a.json"
    refused(source, tmp_path, "a.json", *words)


def test_json_surrogates_and_arrays(tmp_path):
    source = write(tmp_path, a__json='{"user_id": "\\ud800", "item_id": 2}\n') / "a.json"
    refused(source, tmp_path, "a.json", "user_id")
    refused(write(tmp_path, b__json='[{"user_id": 1, "item_id": 2}]') / "b.json", tmp_path, "b.json", "JSON array")
    refused(write(tmp_path, c__json='{"who": 1}\n') / "c.json", tmp_path, "c.json", "no column 'user_id'", "who")


# Folders, archives, compression


def test_hive_partitions_are_columns(tmp_path):
    def table(users, items):
        return pa.table({"user_id": users, "item_id": items})

    source = (
        write(
            tmp_path,
            **{
                "in___dt=2024-01-01___part-0__parquet": table([1, 2], [10, 20]),
                "in___dt=2024-01-02___part-0__parquet": table([1], [30]),
                "in____SUCCESS": "",
                "in___dt=2024-01-01___.part-0__parquet__crc": b"crc",
            },
        )
        / "in"
    )
    for given in (source, f"{source}/*/*.parquet", f"{source}/dt=*/*.parquet"):
        out = ingest(IngestConfig(input=str(given), time="dt"), tmp_path / "out", overwrite=True)
        rows = raw_rows(open_log(out), "time")
        assert rows == [
            (1, 10, dt.datetime(2024, 1, 1)),
            (2, 20, dt.datetime(2024, 1, 1)),
            (1, 30, dt.datetime(2024, 1, 2)),
        ]


def test_hive_partitions_of_ids(tmp_path):
    files = {f"in___user_id={u}___item_id=a%20{u}___x__csv": "r\n1\n" for u in ("007", "7")}
    source = write(tmp_path, **files) / "in"
    assert raw_rows(made(source, tmp_path, label="r")) == [("007", "a 007"), ("7", "a 7")]
    source = write(tmp_path, two___user_id=HEAD, **{"two___user_id=1___x__csv": "item_id\n1\n"}) / "two"
    log = open_log(ingest(IngestConfig(input=str(source)), tmp_path / "more"))
    assert raw_rows(log) == [(1, 1)]


def test_one_more_folder_and_several(tmp_path):
    source = write(tmp_path, one___a___b__csv=HEAD + "1,2\n", one___README__txt="hello") / "one"
    assert raw_rows(made(source, tmp_path)) == [(1, 2)]
    source = write(tmp_path, two___a___b__csv=HEAD + "1,2\n", two___c___d__csv=HEAD + "1,2\n") / "two"
    with pytest.raises(InputError, match=r"b\.csv.*d\.csv"):
        ingest(IngestConfig(input=str(source)), tmp_path / "more")
    source = write(tmp_path, three___a__csv=HEAD + "1,2\n", three___c___d__csv=HEAD + "1,2\n") / "three"
    with pytest.raises(InputError, match=r"a\.csv.*d\.csv"):
        ingest(IngestConfig(input=str(source)), tmp_path / "more")
    source = write(tmp_path, four___a__csv=HEAD + "1,2\n", four___b__tsv="user_id\titem_id\n1\t2\n") / "four"
    with pytest.raises(InputError, match="several formats"):
        ingest(IngestConfig(input=str(source)), tmp_path / "more")


ROWS = HEAD + "1,2\n"
JSON_ROW = '{"user_id": 3, "item_id": 4}\n'
PARQUET = pa.table({"user_id": [5], "item_id": [6]})
ML_ROWS = "userId,movieId,rating,timestamp\n1,10,4.5,7\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"bom__csv": "\ufeff" + ROWS, "x__json": JSON_ROW}, ["bom.csv", "x.json", "*.csv"]),
        ({"a__csv__gz": gzip.compress(ROWS.encode()), "x__jsonl": JSON_ROW}, ["a.csv.gz", "x.jsonl", "*.csv.gz"]),
        ({"a__parquet": PARQUET, "x__jsonl": JSON_ROW}, ["a.parquet", "x.jsonl"]),
        ({"a__parquet": PARQUET, "x__json": f"[{JSON_ROW}]"}, ["a.parquet", "x.json"]),
        ({"a__csv": ROWS, "deep___b__parquet": PARQUET}, ["a.csv", "deep/b.parquet"]),
        ({"ratings__csv": ML_ROWS, "other__csv": ROWS}, ["ratings.csv (movielens)", "other.csv"]),
        ({"ratings__csv": ML_ROWS, "movies__csv": "x", "other__parquet": PARQUET}, ["ratings.csv", "other.parquet"]),
        ({"ratings__csv": ML_ROWS, "x__json": JSON_ROW}, ["ratings.csv", "x.json"]),
        ({"ml___ratings__csv": ML_ROWS, "other__csv": ROWS}, ["ml/ratings.csv", "other.csv"]),
        ({"train__txt": "0 5\n", "a__csv": ROWS}, ["train.txt (lightgcn)", "a.csv"]),
    ],
)
def test_a_folder_with_files_of_several_formats(tmp_path, files, words):
    source = write(tmp_path / "in", **files)
    refused(source, tmp_path, "several formats", *words, "--input", "--format")


def test_a_named_format_or_a_glob_chooses_among_formats(tmp_path):
    source = write(tmp_path / "in", a__csv=ROWS, x__jsonl=JSON_ROW)
    assert raw_rows(made(source, tmp_path, format="csv")) == [(1, 2)]
    log = open_log(ingest(IngestConfig(input=f"{source}/*.jsonl"), tmp_path / "more"))
    assert raw_rows(log) == [(3, 4)]
    with pytest.raises(InputError, match=r"several formats: a\.csv .* x\.jsonl"):
        ingest(IngestConfig(input=f"{source}/*"), tmp_path / "all")


@pytest.mark.parametrize(
    "files",
    [
        {"a__csv": ROWS, "manifest__json": '{"columns": ["user_id", "item_id"]}'},
        {"a__csv": ROWS, "dataset_info__json": '{"user_id": "int"}', "README__md": "#", "LICENSE": "", "_SUCCESS": ""},
    ],
)
def test_descriptions_beside_tables_are_not_rows(tmp_path, caplog, files):
    assert raw_rows(made(write(tmp_path / "in", **files), tmp_path)) == [(1, 2)]
    assert not caplog.messages


def test_json_without_the_columns_beside_tables_is_named(tmp_path, caplog):
    source = write(tmp_path / "in", a__csv=ROWS, stats__json='{\n  "rows": 1\n}\n')
    assert raw_rows(made(source, tmp_path)) == [(1, 2)]
    assert [line for line in caplog.messages if "not read" in line and "stats.json" in line]


def test_movielens_with_all_of_its_files(tmp_path):
    others = {f"{name}__csv": "x\n1\n" for name in ("tags", "links", "genome-scores", "genome-tags")}
    movies = "movieId,title,genres\n10,A (1995),Drama\n"
    source = write(tmp_path / "in", ratings__csv=ML_ROWS, movies__csv=movies, README__txt="hello", **others)
    assert raw_rows(made(source, tmp_path)) == [(1, 10)]
    alone = write(tmp_path / "other", ratings__csv=ML_ROWS, b__csv=ROWS) / "ratings.csv"
    assert raw_rows(open_log(ingest(IngestConfig(input=str(alone)), tmp_path / "more"))) == [(1, 10)]


@pytest.mark.parametrize(
    ("train", "held_out", "content"),
    [
        ("train.csv", "test.csv", ROWS),
        ("train.parquet", "val.parquet", PARQUET),
        ("ml_train.tsv", "ml_valid.tsv", ROWS.replace(",", "\t")),
        ("train.json", "test.json", JSON_ROW),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", PARQUET),
        ("part=train/a.csv", "part=test/a.csv", ROWS),
    ],
)
def test_parts_of_a_folder_are_not_pooled(tmp_path, caplog, train, held_out, content):
    names = {name.replace("/", "___").replace(".", "__"): content for name in (train, held_out, "README.md")}
    source = write(tmp_path / "in", **names)
    (source / "README.md").write_text("hello")
    refused(source, tmp_path, f"{held_out} is named like a held-out part, beside {train}", f"--input {source}/{train}")
    assert len(raw_rows(made(source / train, tmp_path))) == 1
    assert not caplog.messages
    both = f"{source}/part=*/*.csv" if "/" in train else f"{source}/*.{train.rpartition('.')[2]}"
    log = open_log(ingest(IngestConfig(input=both), tmp_path / "pooled"))
    assert len(raw_rows(log)) == 2
    assert [line for line in caplog.messages if "read as train" in line and held_out.rpartition("/")[2] in line]


def test_a_split_column_says_the_parts_of_files_too(tmp_path):
    text = "user_id,item_id,s\n1,2,{}\n"
    source = write(tmp_path / "in", train__csv=text.format("train"), test__csv=text.format("test"))
    assert raw_rows(made(source, tmp_path, split_column="s"), part="test") == [(1, 2)]


def test_a_log_is_not_raw(tmp_path):
    log = ingest(IngestConfig(input=str(write(tmp_path, a__csv=ROWS) / "a.csv")), tmp_path / "log")
    for options in ({}, {"format": "parquet"}, {"holdout": "random"}):
        refused(log, tmp_path, f"{log}: is already a log", **options)
    other = write(tmp_path / "in", a__csv=ROWS, manifest__json='{"format": "other"}')
    assert raw_rows(made(other, tmp_path)) == [(1, 2)]


def test_errors_have_the_names_of_the_columns_of_the_file(tmp_path):
    names = {"user": "u", "item": "i", "label": "rating", "time": "ts"}
    good = [1, 2, 3.0, 4]
    for place, (name, bad) in enumerate({"u": [1], "i": {"a": 1}, "rating": "x", "ts": "soon"}.items()):
        row = [[bad] if k == place else [value] for k, value in enumerate(good)]
        table = pa.table(dict(zip(names.values(), row, strict=True)))
        source = write(tmp_path, **{f"{name}__parquet": table}) / f"{name}.parquet"
        refused(source, tmp_path, f"{name}.parquet, column '{name}'", **names)
    source = write(tmp_path, ratings__csv=ML_ROWS + "1,11,x,8\n") / "ratings.csv"
    refused(source, tmp_path, "ratings.csv, column 'rating', row 1: 'x'")


def test_each_file_has_its_own_delimiter(tmp_path):
    tabs = "user_id\titem_id\n3\t4\n"
    source = write(tmp_path / "in", a__csv=ROWS, b__csv=tabs, c__csv="user_id;item_id\n5;6\n")
    assert raw_rows(made(source, tmp_path)) == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize("mark", ["_delta_log___0__json", ".hoodie___x", "metadata___v1__metadata__json"])
def test_folders_of_table_formats(tmp_path, mark):
    table = pa.table({"user_id": [1], "item_id": [2]})
    source = write(tmp_path, **{f"in___{mark}": "{}", "in___data___a__parquet": table}) / "in"
    refused(source, tmp_path, "table", "Parquet")


def test_names_that_look_like_globs(tmp_path):
    source = write(tmp_path, **{"in[1]___a[0]*__csv": HEAD + "1,2\n", "in[1]___a0x__csv": HEAD + "3,4\n"}) / "in[1]"
    assert raw_rows(made(source, tmp_path)) == [(3, 4), (1, 2)]
    log = open_log(ingest(IngestConfig(input=f"{source}/a[0]*.csv"), tmp_path / "one"))
    assert raw_rows(log) == [(1, 2)]
    refused(tmp_path / "none*.csv", tmp_path / "in[1]", "none*.csv", "no file")


def test_compression(tmp_path):
    text = (HEAD + "1,10\n2,20\n").encode()
    write(tmp_path, a__csv__gz=gzip.compress(text[:20]) + gzip.compress(text[20:]), b__csv__bz2=bz2.compress(text))
    with pa.CompressedOutputStream(str(tmp_path / "c.csv.zst"), "zstd") as stream:
        stream.write(text)
    for name in ("a.csv.gz", "b.csv.bz2", "c.csv.zst"):
        assert raw_rows(open_log(ingest(IngestConfig(input=str(tmp_path / name)), tmp_path / f"o-{name}"))) == [
            (1, 10),
            (2, 20),
        ]
    write(tmp_path, cut__csv__gz=gzip.compress(text)[:-9], fake__csv__gz=text, x__tar__gz=b"x")
    for name in ("cut.csv.gz", "fake.csv.gz", "x.tar.gz"):
        refused(tmp_path / name, tmp_path, name)


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("ml/ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.5,7\n")
        archive.writestr("__MACOSX/ml/._ratings.csv", b"\0")
    log = made(tmp_path / "a.zip", tmp_path)
    assert raw_rows(log, "label") == [(1, 10, 4.5)]
    assert log.manifest["inputs"][0]["name"].endswith("a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    write(tmp_path, b__zip=whole[:40], c__zip=whole.replace(b"4.5", b"3.5", 1))
    for name in ("b.zip", "c.zip"):
        with pytest.raises(InputError, match=name):
            ingest(IngestConfig(input=str(tmp_path / name)), tmp_path / "more")


# Public data sets


RATINGS = "1::10::4.5::978300760\n2::20::3::978302109\n"


def test_movielens_side_tables_split_at_newlines_alone(tmp_path):
    for number, blob in enumerate(
        (
            "10::Ådalen… (1969)::Drama\n20::B (1995)::Comedy\n".encode(),
            "10::Wait… (1969)::Drama\n20::B (1995)::Comedy\n\n".encode("cp1252"),
        )
    ):
        source = write(tmp_path / str(number), ratings__dat=RATINGS.replace("\n", "\r\n"), movies__dat=blob)
        log = open_log(ingest(IngestConfig(input=str(source)), tmp_path / f"out{number}"))
        assert log.features("item").column("year").to_pylist() == [1969, 1995]
    twice = write(tmp_path / "twice", ratings__dat=RATINGS, movies__dat="10::A (1990)::X\n10::B (1991)::Y\n")
    (tmp_path / "target").mkdir()
    refused(twice, tmp_path / "target", "10", "twice")


@pytest.mark.parametrize(
    "name", ["u__data", "ml-100k___u__data", "ratings__dat", "ratings__csv__gz", "ml-1m___ratings__dat"]
)
def test_movielens_variants(tmp_path, name):
    rows = [line.split("::") for line in RATINGS.splitlines()]
    text = {
        "u": "".join("\t".join(row) + "\n" for row in rows),
        "dat": RATINGS,
        "gz": gzip.compress(("userId,movieId,rating,timestamp\n" + "".join(",".join(r) + "\n" for r in rows)).encode()),
    }
    content = text["u" if name.endswith("data") else name.rsplit("__", 1)[1]]
    log = made(write(tmp_path / "in", **{name: content}), tmp_path)
    assert raw_rows(log, "label", "time") == [(1, 10, 4.5, 978300760), (2, 20, 3.0, 978302109)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ratings__dat": RATINGS, "ratings__csv": RATINGS}, ["ratings.dat", "ratings.csv"]),
        ({"ratings__dat": RATINGS.replace("::", ",")}, ["ratings.dat", "Expected 7 columns"]),
        ({"ratings__dat": "1:x:10::4::1\n"}, ["ratings.dat, row 0"]),
        ({"ratings__dat": RATINGS + "x::10::1::2\n"}, ["ratings.dat", "row 2", "'x'"]),
        ({"ratings__csv": "A1,B2,5.0,7\n"}, ["ratings.csv", "userId", "--format csv"]),
    ],
)
def test_movielens_that_is_none(tmp_path, files, words):
    refused(write(tmp_path / "in", **files), tmp_path, *words)


@pytest.mark.parametrize("negatives", ["(0,2)\t5\t6\n", "(0,2)\t5\n(1,1)\t7\n(2,2)\t7\n(2,2)\t7\n", "\n"])
def test_negatives_that_are_not_one_for_each_case(tmp_path, negatives):
    source = write(
        tmp_path / "in",
        p__train__rating="0\t0\t5\t97\n1\t0\t1\t98\n2\t1\t1\t98\n",
        p__test__rating="0\t2\t1\t99\n1\t1\t1\t99\n2\t2\t1\t99\n",
        p__test__negative=negatives,
    )
    refused(source, tmp_path, "p.test.negative", "p.test.rating", "3")


def test_lightgcn_lines_of_one_file(tmp_path):
    source = write(tmp_path, a__txt="0 5 6\r\n\r\n1\t6 \r\n") / "a.txt"
    assert raw_rows(made(source, tmp_path, format="lightgcn")) == [(0, 5), (0, 6), (1, 6)]
    source = write(tmp_path, b__txt="007 5\n7 5\n") / "b.txt"
    log = open_log(ingest(IngestConfig(input=str(source), format="lightgcn"), tmp_path / "more"))
    assert raw_rows(log) == [("007", 5), ("7", 5)]


def test_parts_without_rows_are_none(tmp_path):
    log = made(write(tmp_path / "in", train__txt="0 5\n", test__txt="\n"), tmp_path)
    assert raw_rows(log) == [(0, 5)]
    assert log.test is None


def test_criteo_without_labels(tmp_path):
    line = "\t".join(["1"] * 13 + ["a"] * 26) + "\n"
    refused(write(tmp_path / "in", train__txt=line), tmp_path, "train.txt", "39 fields", "label")
    header = "\t".join(["label", *["x"] * 39]) + "\n"
    refused(write(tmp_path / "head", train__txt=header + "0\t" + line), tmp_path, "train.txt", "row 0", "'label'")
    wide = "user_id\titem_id\t" + "\t".join(f"c{k}" for k in range(38)) + "\n" + "\t".join(["1"] * 40) + "\n"
    log = made(write(tmp_path / "wide", a__tsv=wide), tmp_path)
    assert raw_rows(log) == [(1, 1)]  # 40 columns do not make it Criteo's
