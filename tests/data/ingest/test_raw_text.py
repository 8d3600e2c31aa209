"""Delimited text and JSON lines: delimiters, quotes, lines, encodings, and the line that an error names."""

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.ingest.ingest_cases import HEAD, made, raw_rows, refused, write


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
    refused(source, tmp_path, "line 2", "user_id", "--encoding", delimiter="#")
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
        ('{"user_id": "1", "item_id": 2}', ["line 2", "user_id", "string", "number"]),
        ('{"user_id": 1.5, "item_id": 2}', ["line 2", "1.5"]),
        ('{"user_id": 1e400, "item_id": 2}', ["line 2", "inf"]),
        ('{"user_id": true, "item_id": 2}', ["line 2", "boolean"]),
        ('{"user_id": {"a": 1}, "item_id": 2}', ["line 2", "object", "number", "line 1"]),
        ('{"user_id": null, "item_id": 2}', ["line 2", "no user_id"]),
        ('{"item_id": 2}', ["line 2", "no user_id"]),
        ('{"user_id": 1, "item_id"', ["line 2", "JSON"]),
        ("[1, 2]", ["line 2", "JSON"]),
        ("[" * 100000, ["line 2"]),
        ('{"user_id": ' + "9" * 5000 + ', "item_id": 2}', ["line 2"]),
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


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["", "", "user_id,item_id,r", '1,"two', 'lines",3', "", "2,4,bad"], {}, "line 7: 'bad'"),
        (["user_id,item_id,r", '1,"two', 'lines",3', "", "2,4"], {}, "line 5: Expected 3 columns, got 2"),
        (["user_id,item_id,r", '1,"', "", ",3", "2,,1"], {"quoting": "off"}, "line 2: Expected 3 columns, got 2"),
        (["user_id;item_id;r", '1;2";3', "", "2;3;"], {}, "line 4: no label"),
        (["1,2,3", "", "", "4,5,x"], {"columns": ("user_id", "item_id", "r")}, "line 4: 'x'"),
    ],
)
def test_errors_name_the_line_of_the_file(tmp_path, rows, options, message, end):
    """Counted from 1, whatever lines are empty, part of a value, or a header."""
    source = write(tmp_path, a__csv=end.join(rows) + end) / "a.csv"
    refused(source, tmp_path, "a.csv", message, label="r", **options)


@pytest.mark.parametrize(
    ("bad", "message"), [("1,2,x", "line 608: 'x'"), ("1,2", "line 608: Expected 3 columns, got 2")]
)
def test_errors_in_later_blocks_name_the_line_of_the_file(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr("recpress.data.ingest.raw_text.BLOCK", 256)
    text = "user_id,item_id,r\n" + '1,"two\nlines",3\n\n' * 202 + f"{bad}\n"
    refused(write(tmp_path, a__csv=text) / "a.csv", tmp_path, "a.csv", message, label="r")


def test_errors_of_a_compressed_file_in_another_encoding_name_the_line(tmp_path):
    text = "user_id,item_id,r\n" + "é,1,2\n" * 9 + "\né,1,x\n"
    source = write(tmp_path, a__csv__gz=gzip.compress(text.encode("utf-16"))) / "a.csv.gz"
    refused(source, tmp_path, "a.csv.gz, column 'r', line 12: 'x'", label="r")
