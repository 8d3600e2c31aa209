"""Finding the files to read: folders, partitions, globs, archives, compression."""

import bz2
import datetime as dt
import gzip
import zipfile

import pyarrow as pa
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
