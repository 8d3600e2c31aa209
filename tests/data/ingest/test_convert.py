"""The choice of a format and of the files, whole conversions, and bad input with the place that its error names."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig, LayoutConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.sampling.scan import iter_columns
from tests.data.ingest.ingest_cases import (
    JSON_ROW,
    ML_ROWS,
    PARQUET,
    ROWS,
    made,
    raw_rows,
    read_all,
    refused,
    write,
)


def test_csv_with_strings_features_and_split(tmp_path):
    text = "who,what,score,when,colour,size,part\n"
    text += "ann,tea,1,2024-01-01 00:00:00,red,1.5,train\nbob,milk,0,2024-01-02 00:00:00,,,train\n"
    text += "ann,milk,1,2024-01-03 00:00:00,red,2,valid\ncid,tea,1,2024-01-04 00:00:00,blue,3,test\n"
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(text)
    config = IngestConfig(
        input=f"{tmp_path}/*.csv.gz",
        user="who",
        item="what",
        label="score",
        time="when",
        categorical=("colour",),
        floats=("size",),
        split_column="part",
    )
    log = open_log(ingest(config, tmp_path / "log"))
    assert raw_rows(log) == [("ann", "tea"), ("bob", "milk")]
    assert raw_rows(log, part="val") == [("ann", "milk")]
    assert raw_rows(log, part="test") == [("cid", "tea")]
    data = next(iter_columns(log.train, ["time", "colour", "size"]))
    assert data["time"].tolist() == [1704067200000, 1704153600000]
    assert data["colour"].tolist() == [0, 1]
    assert data["size"][0] == 1.5
    assert np.isnan(data["size"][1])


def test_tsv_without_header_and_parquet_give_the_same_log(tmp_path):
    (tmp_path / "a.tsv").write_text("7\t30\n8\t31\n7\t31\n")
    names = IngestConfig(input=str(tmp_path / "a.tsv"), columns=("u", "i"), user="u", item="i")
    pq.write_table(
        pa.table({"u": [7, 8, 7], "i": [30, 31, 31], "tags": [["a", "b"], [], ["b"]]}), tmp_path / "a.parquet"
    )
    of_parquet = IngestConfig(input=str(tmp_path / "a.parquet"), user="u", item="i", categorical=("tags",))
    one = open_log(ingest(names, tmp_path / "one"))
    two = open_log(ingest(of_parquet, tmp_path / "two"))
    assert raw_rows(one) == raw_rows(two) == [(7, 30), (8, 31), (7, 31)]
    assert one.vocabulary_fingerprint("user") == two.vocabulary_fingerprint("user")
    tags = next(iter_columns(two.train, ["tags"]))["tags"]
    assert tags.values.tolist() == [0, 1, 1]
    assert tags.offsets.tolist() == [0, 2, 2, 3]


def test_holdout_last(tmp_path):
    rows = [(user, item, 10 * user + item) for user in range(5) for item in range(4)]
    (tmp_path / "a.csv").write_text("user_id,item_id,t\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    config = IngestConfig(input=str(tmp_path / "a.csv"), time="t", holdout="last", negatives=0)
    log = open_log(ingest(config, tmp_path / "log"))
    assert sorted(raw_rows(log, part="test")) == [(user, 3) for user in range(5)]
    assert log.train.num_rows == 15
    assert log.counts("item").tolist() == [5, 5, 5, 0]
    assert log.manifest["source"] == "csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "log"]


def test_many_files_and_row_groups_keep_the_order(tmp_path):
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 1000, (5000, 2))
    for part in range(3):
        chunk = pairs[part * 2000 : part * 2000 + 2000]
        (tmp_path / f"{part}.csv").write_text("user_id,item_id\n" + "".join(f"{u},{i}\n" for u, i in chunk))
    layout = LayoutConfig(rows_per_file=1700, row_group_rows=300)
    log = open_log(ingest(IngestConfig(input=f"{tmp_path}/*.csv", layout=layout), tmp_path / "log"))
    assert len(log.train.files) == 3
    assert max(group.num_rows for group in log.train.groups) == 300
    assert raw_rows(log) == [tuple(pair) for pair in pairs.tolist()]
    assert np.array_equal(log.counts("user"), np.bincount(read_all(log, log.train, ["user_id"])["user_id"]))


BAD = {
    "no format": ("a.xyz", "1,2\n", {}, r"a\.xyz: the names of the files show no format"),
    "missing column": (
        "a.csv",
        "user_id,thing\n1,2\n",
        {},
        r"a\.csv: no column 'item_id'; found user_id, thing",
    ),
    "null id": ("a.csv", "user_id,item_id\n1,2\n3,4\n,5\n", {}, r"a\.csv, line 4: no user_id"),
    "empty string id": ("a.csv", "user_id,item_id\na,x\nb,\n", {}, r"a\.csv, line 3: no item_id"),
    "not a number": (
        "a.csv",
        "user_id,item_id,r\n1,2,3\n1,3,good\n",
        {"label": "r"},
        r"a\.csv, column 'r', line 3: 'good'",
    ),
    "NaN label": (
        "a.csv",
        "user_id,item_id,r\n1,2,3\n1,3,nan\n",
        {"label": "r"},
        r"a\.csv, line 3: no label \(column 'r'\)",
    ),
    "no time": ("a.csv", "user_id,item_id,t\n1,2,x\n", {"time": "t"}, r"a\.csv, column 't', line 2: 'x'"),
    "fields": ("a.csv", "user_id,item_id\n1,2\n1\n", {}, r"a\.csv, line 3: Expected 2 columns, got 1"),
    "empty": ("a.csv", "", {}, r"a\.csv: empty; expected a header"),
    "no rows": ("a.csv", "user_id,item_id\n", {}, r"no rows for train"),
    "split": (
        "a.csv",
        "user_id,item_id,s\n1,2,train\n1,3,later\n",
        {"split_column": "s"},
        r"a\.csv, line 3: split 'later' \(column 's'\)",
    ),
    "null in a column of another name": (
        "a.csv",
        "who,item_id\n1,2\n,5\n",
        {"user": "who"},
        r"a\.csv, line 3: no user_id \(column 'who'\)",
    ),
    "truncated parquet": ("a.parquet", "PAR1....", {}, r"a\.parquet: "),
    "empty user": ("train.txt", "0 1 2\n1\n", {}, r"train\.txt, line 2: a user without items"),
    "bad token": ("train.txt", "0 1 2\n1 -4\n", {}, r"train\.txt, line 2: '-4'; expected ids >= 0"),
    "memory": (
        "a.csv",
        "user_id,item_id\n1,2\n",
        {"memory_gib": 1e-9},
        r"vocabulary of user: over 0 ids need more",
    ),
    "two meanings": (
        "a.csv",
        "user_id,item_id\n1,2\n",
        {"label": "item_id"},
        r"column 'item_id' is given two meanings",
    ),
    "nothing": ("a.csv", "user_id,item_id\n1,2\n", {"input": "nowhere.csv"}, r"nowhere\.csv: no such file"),
    "extend": ("a.csv", "user_id,item_id\n1,2\n", {"extend": "nowhere"}, r"nowhere: no such file"),
    "holdout": ("a.csv", "user_id,item_id\n1,2\n", {"holdout": "random"}, r"no user has two items"),
    "last": (
        "a.csv",
        "user_id,item_id\n1,2\n1,3\n",
        {"holdout": "last"},
        r"a\.csv: --holdout last .*; name it with --time",
    ),
    "last without times": (
        "train.txt",
        "0 1 2\n1 2 3\n",
        {"holdout": "last"},
        r"lightgcn has none; .*--holdout random",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_its_place_and_leaves_nothing(tmp_path, case):
    name, text, more, message = BAD[case]
    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_text(text)
    config = IngestConfig(**({"input": str(source / name)} | more))
    with pytest.raises(InputError, match=message) as raised:
        ingest(config, tmp_path / "log")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_target_is_kept(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    config = IngestConfig(input=str(tmp_path / "a.csv"))
    ingest(config, tmp_path / "log")
    with pytest.raises(InputError, match="exists already"):
        ingest(config, tmp_path / "log")
    ingest(config, tmp_path / "log", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="is not an artifact"):
        ingest(config, tmp_path / "mine", overwrite=True)


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
    refused(source, tmp_path, f"{held_out} is named like a held-out part, next to {train}", f"--input {source}/{train}")
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
