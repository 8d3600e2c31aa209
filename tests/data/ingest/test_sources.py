"""Tables with named columns."""

import pyarrow as pa

from tests.data.ingest.ingest_cases import ML_ROWS, ROWS, made, raw_rows, refused, write


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
    refused(source, tmp_path, "c.json, line 1", "item_id", "twice")
    other = pa.Table.from_arrays([pa.array([1])] * 4, names=["user_id", "item_id", "x", "x"])
    assert raw_rows(made(write(tmp_path, d__parquet=other) / "d.parquet", tmp_path)) == [(1, 1)]


def test_flat_columns_with_dots(tmp_path):
    table = pa.table({"item_id.x": [5, 6], "user_id": [1, 2], "item_id": [3, 4]})
    assert raw_rows(made(write(tmp_path, a__parquet=table) / "a.parquet", tmp_path)) == [(1, 3), (2, 4)]


def test_errors_have_the_names_of_the_columns_of_the_file(tmp_path):
    names = {"user": "u", "item": "i", "label": "rating", "time": "ts"}
    good = [1, 2, 3.0, 4]
    for place, (name, bad) in enumerate({"u": [1], "i": {"a": 1}, "rating": "x", "ts": "soon"}.items()):
        row = [[bad] if k == place else [value] for k, value in enumerate(good)]
        table = pa.table(dict(zip(names.values(), row, strict=True)))
        source = write(tmp_path, **{f"{name}__parquet": table}) / f"{name}.parquet"
        refused(source, tmp_path, f"{name}.parquet, column '{name}'", **names)
    source = write(tmp_path, ratings__csv=ML_ROWS + "1,11,x,8\n") / "ratings.csv"
    refused(source, tmp_path, "ratings.csv, column 'rating', line 3: 'x'")


def test_each_file_has_its_own_delimiter(tmp_path):
    tabs = "user_id\titem_id\n3\t4\n"
    source = write(tmp_path / "in", a__csv=ROWS, b__csv=tabs, c__csv="user_id;item_id\n5;6\n")
    assert raw_rows(made(source, tmp_path)) == [(1, 2), (3, 4), (5, 6)]
