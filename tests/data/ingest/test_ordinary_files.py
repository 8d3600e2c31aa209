"""Files of public data sets and of common programs, and the rows that `ingest` makes of them."""

import bz2
import datetime as dt
import gzip
import io
import logging
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.log import open_log
from tests.data.ingest.ingest_cases import HEAD, ROWS, made, raw_rows, refused

AMAZON = (
    '{"overall": 5.0, "reviewerID": "A3N", "asin": "B00", "style": {"Size:": " S"}, "reviewText": "a\\nb \\"q\\"", '
    '"unixReviewTime": 1472688000}\n{"reviewerID":"A1","asin":"0000013714","overall":4,"unixReviewTime":1472688001}\n'
)
YELP = '{"review_id":"KU","user_id":"mh_","business_id":"XQf","stars":3.0,"date":"2018-07-07 22:09:11"}\n'
LASTFM = (
    'user_000001\t2009-05-04T23:08:57Z\tf1b1\tDeep "Dish\t\tFamous\nuser_000001\t2009-05-04T13:54:10Z\ta7f7\ty\t\tz\n'
)
MOVIES = (
    'movieId,title,genres\r\n2,"President, The (1995)",Comedy|Drama\r\n29,"Say ""hi"" (1995)",(no genres listed)\r\n'
)
UTC = dt.UTC


def zipped(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", ".").replace("DIR", "/"), content)
    return data.getvalue()


def parquet(**columns):
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


CASES = {
    "MovieLens 100K": (
        {
            "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
            "u.item": "242|Kolya (1996)|24-Jan-1997||http|0\n",
            "u1.base": "196\t242\t3\t881250949\n",
            "u1.test": "186\t302\t3\t891717742\n",
        },
        {},
        [(196, 242, 3.0, 881250949), (186, 302, 3.0, 891717742)],
    ),
    "MovieLens 20M": (
        {
            "ratings.csv": "userId,movieId,rating,timestamp\r\n1,2,3.5,1112486027\r\n1,29,3.5,1112484676\r\n",
            "movies.csv": MOVIES,
            "tags.csv": 'userId,movieId,tag,timestamp\r\n1,2,"a\nb",1\r\n',
        },
        {},
        [(1, 2, 3.5, 1112486027), (1, 29, 3.5, 1112484676)],
    ),
    "MovieLens of Kaggle": (
        {"rating.csv": '"userId","movieId","rating","timestamp"\n1,2,3.5,"2005-04-02 23:53:47"\n'},
        {"user": "userId", "item": "movieId", "label": "rating", "time": "timestamp"},
        [(1, 2, 3.5, dt.datetime(2005, 4, 2, 23, 53, 47))],
    ),
    "Amazon reviews": (
        {"reviews_5.json.gz": gzip.compress(AMAZON.encode())},
        {"user": "reviewerID", "item": "asin", "label": "overall", "time": "unixReviewTime"},
        [("A3N", "B00", 5.0, 1472688000), ("A1", "0000013714", 4.0, 1472688001)],
    ),
    "Amazon ratings without a header": (
        {"all.csv": "A2S,0000013714,5.0,1353024000\nA3,12,1.0,1353024001\n"},
        {"columns": ("u", "i", "r", "t"), "user": "u", "item": "i", "label": "r", "time": "t"},
        [("A2S", "0000013714", 5.0, 1353024000), ("A3", "12", 1.0, 1353024001)],
    ),
    "Yelp": (
        {"review.json": YELP},
        {"item": "business_id", "label": "stars", "time": "date"},
        [("mh_", "XQf", 3.0, dt.datetime(2018, 7, 7, 22, 9, 11))],
    ),
    "Last.fm": (
        {"plays.tsv": LASTFM},
        {"columns": ("u", "t", "a", "n", "b", "c"), "user": "u", "item": "a", "time": "t"},
        [
            ("user_000001", "f1b1", dt.datetime(2009, 5, 4, 23, 8, 57, tzinfo=UTC)),
            ("user_000001", "a7f7", dt.datetime(2009, 5, 4, 13, 54, 10, tzinfo=UTC)),
        ],
    ),
    "Steam": (
        {"steam-200k.csv": '15,"The Elder Scrolls V",purchase,1.0,0\n15,"The Elder Scrolls V",play,273.0,0\n'},
        {"columns": ("u", "g", "b", "h", "z"), "user": "u", "item": "g", "label": "h"},
        [(15, "The Elder Scrolls V", 1.0), (15, "The Elder Scrolls V", 273.0)],
    ),
    "Book-Crossing": (
        {"BX.csv": '"User-ID";"ISBN";"Rating"\r\n"27";"034545104X";"0"\r\n"28";"0155061224";"5"\r\n'},
        {"user": "User-ID", "item": "ISBN", "label": "Rating"},
        [(27, "034545104X", 0.0), (28, "0155061224", 5.0)],
    ),
    "Epinions": (
        {"ratings.txt": "22605 42915 5\n22605 5052 4\n"},
        {"format": "csv", "delimiter": " ", "columns": ("u", "i", "r"), "user": "u", "item": "i", "label": "r"},
        [(22605, 42915, 5.0), (22605, 5052, 4.0)],
    ),
    "byte order mark and quotes": ({"a.csv": b'\xef\xbb\xbf"user_id","item_id"\r\n"1","2"\r\n'}, {}, [(1, 2)]),
    "carriage returns": ({"a.csv": "user_id,item_id\r1,2\r3,4\r"}, {}, [(1, 2), (3, 4)]),
    "quoted line breaks": ({"a.csv": 'user_id,item_id,x\n1,2,"a\nb, ""c""\n"\n3,4,ok\n'}, {}, [(1, 2), (3, 4)]),
    "an index of pandas": ({"a.csv": ",user_id,item_id\n0,1,2\n1,3,4\n"}, {}, [(1, 2), (3, 4)]),
    "other orders of columns": (
        {"1.csv": "user_id,item_id,r\n1,2,3\n", "2.csv": "r,item_id,user_id,x\n6,5,4,y\n"},
        {"label": "r"},
        [(1, 2, 3.0), (4, 5, 6.0)],
    ),
    "integers, then text": ({"1.csv": ROWS, "2.csv": HEAD + "a,5\n"}, {}, [("1", 2), ("a", 5)]),
    "UTF-16": ({"a.csv": (HEAD + "é,2\n").encode("utf-16")}, {}, [("é", 2)]),
    "Windows-1252": ({"a.csv": (HEAD + "€,2\n").encode("cp1252")}, {"encoding": "cp1252"}, [("€", 2)]),
    "composed and decomposed letters": (
        {"a.csv": HEAD + "\u00e9,1\ne\u0301,2\n"},
        {},
        [("\u00e9", 1), ("e\u0301", 2)],
    ),
    "ids like other values": (
        {"a.csv": HEAD + "nan,1\nNULL,2\n1e5,3\nTrue,4\n100000,5\n2024-01-01,6\n"},
        {},
        [("nan", 1), ("NULL", 2), ("1e5", 3), ("True", 4), ("100000", 5), ("2024-01-01", 6)],
    ),
    "leading zeros": ({"a.csv": HEAD + "007,1\n7,2\n"}, {}, [("007", 1), ("7", 2)]),
    "integers above 64 bits": (
        {"a.csv": HEAD + "18446744073709551616,1\n9223372036854775807,2\n"},
        {},
        [("18446744073709551616", 1), ("9223372036854775807", 2)],
    ),
    "times of BigQuery": (
        {"a.csv": "user_id,item_id,t\n1,2,2024-01-01 10:00:00.5 UTC\n3,4,2024-01-01 10:00:00 UTC\n"},
        {"time": "t"},
        [
            (1, 2, dt.datetime(2024, 1, 1, 10, 0, 0, 500000, tzinfo=UTC)),
            (3, 4, dt.datetime(2024, 1, 1, 10, tzinfo=UTC)),
        ],
    ),
    "times with zones": (
        {"a.csv": "user_id,item_id,t\n1,2,2024-01-01T10:00:00+02:00\n3,4,2024-01-01T10:00:00Z\n"},
        {"time": "t"},
        [
            (1, 2, dt.datetime(2024, 1, 1, 8, tzinfo=UTC)),
            (3, 4, dt.datetime(2024, 1, 1, 10, tzinfo=UTC)),
        ],
    ),
    "negative labels": (
        {"a.csv": "user_id,item_id,l\n1,2,0\n1,3,1\n1,4,-1\n1,2,0\n"},
        {"label": "l"},
        [(1, 2, 0.0), (1, 3, 1.0), (1, 4, -1.0), (1, 2, 0.0)],
    ),
    "a zip of a Mac": (
        {"a.zip": zipped(dataDIRa__csv=ROWS, __MACOSXDIRdataDIR___a__csv="\0\5")},
        {},
        [(1, 2)],
    ),
    "a zip of gzip": ({"a.zip": zipped(a__csv__gz=gzip.compress(ROWS.encode()))}, {}, [(1, 2)]),
    "gzip in two parts": ({"a.csv.gz": gzip.compress(ROWS.encode()) + gzip.compress(b"3,4\n")}, {}, [(1, 2), (3, 4)]),
    "suffixes in capitals": (
        {"A.CSV.GZ": gzip.compress(ROWS.encode()), "B.csv.BZ2": bz2.compress(ROWS.encode())},
        {},
        [(1, 2), (1, 2)],
    ),
    "files of Hive": (
        {"000000_0": parquet(user_id=[1], item_id=[2]), "000001_0": parquet(user_id=[3], item_id=[4])},
        {"format": "parquet"},
        [(1, 2), (3, 4)],
    ),
    "an empty part of Spark": (
        {
            "part-0.parquet": parquet(user_id=pa.array([], pa.string()), item_id=pa.array([], pa.int64())),
            "part-1.parquet": parquet(user_id=["a"], item_id=[2]),
        },
        {},
        [("a", 2)],
    ),
    "JSON with large integers": (
        {"a.jsonl": '{"user_id":18446744073709551615,"item_id":2}\n{"user_id":1,"item_id":2}\n'},
        {},
        [("18446744073709551615", 2), ("1", 2)],
    ),
}


def write_all(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / next(iter(files)) if len(files) == 1 else folder


@pytest.mark.parametrize("case", CASES)
def test_rows(tmp_path, case):
    files, options, expected = CASES[case]
    log = made(write_all(tmp_path / "in", files), tmp_path, **options)
    more = [name for name in ("label", "time") if name in pq.read_schema(next(iter(log.train.files)).path).names]
    found = raw_rows(open_log(log.path), *more)
    assert found == expected


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"a.csv": "uid,iid\n1,2\n"}, {}, ["found uid, iid", "--user, --item", "--columns"]),
        ({"a.jsonl": '{"uid":1}\n'}, {}, ["no column 'user_id'", "--user"]),
        ({"a.parquet": parquet(uid=[1])}, {}, ["no column 'user_id'", "--user"]),
        ({"a.csv": "user_id;item_id;r\n1;2;4,5\n"}, {"label": "r"}, ["line 2", "'4,5'", "without commas"]),
        ({"a.csv": 'user_id,item_id,r\n1,2,"1,234"\n'}, {"label": "r"}, ["'1,234'", "without commas"]),
        ({"a.csv": gzip.compress(ROWS.encode())}, {}, ["gzip", ".gz"]),
        ({"a.csv": zipped(a="b")}, {}, ["a zip file or a spreadsheet"]),
        ({"a.csv": parquet(user_id=[1])}, {}, ["a Parquet file"]),
        ({"a.csv": ROWS.encode("utf-16-le")}, {}, ["--encoding utf-16-le"]),
        ({"a.xlsx": zipped(a="b")}, {}, ["neither text nor Parquet"]),
        ({"a.csv.xz": b"\xfd7zXZ"}, {}, ["unpacked"]),
        ({"a.csv": "user_id,item_id,t\n1,2,2024-13-01 10:00:00 UTC\n"}, {"time": "t"}, ["'2024-13-01 10:00:00 UTC'"]),
    ],
)
def test_refused(tmp_path, files, options, words):
    refused(write_all(tmp_path / "in", files), tmp_path, *words, **options)


def test_spaces_and_quotes_around_ids_are_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made(write_all(tmp_path / "in", {"a.tsv": 'user_id\titem_id\n"1"\t2\n"2"\t x\n'}), tmp_path)
    assert "2 users have quotes around their ids, such as '\"1\"'" in caplog.text
    assert "1 items have spaces" in caplog.text
