"""Each format round trip on files that the test writes, and each bad input with the place that its error
names."""

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


def read_all(log, rows, columns):
    parts = list(iter_columns(rows, columns))
    return {name: np.concatenate([part[name] for part in parts]) for name in columns}


def raw_pairs(log, rows):
    """Rows as (raw user, raw item), by the log's vocabularies."""
    data = read_all(log, rows, ["user_id", "item_id"])
    sides = []
    for side in ("user", "item"):
        raw = log.vocabulary(side).column("raw").to_pylist()
        sides.append([raw[k] for k in data[f"{side}_id"]])
    return list(zip(*sides, strict=True))


RATINGS = "1::1193::5::978300760\n1::661::3.5::978302109\n2::1193::4::978301968\n7::2::0.5::978300275\n"


def write_movielens(folder):
    folder.mkdir()
    (folder / "ratings.dat").write_text(RATINGS)
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    movies = "1193::One Flew: Over the Nest (1975)::Drama\n661::Giant Peach (1996)::Animation|Children's\n"
    (folder / "movies.dat").write_bytes((movies + "9::Café (1999)::Drama\n").encode("latin-1"))


def test_movielens_dat_with_side_tables(tmp_path):
    write_movielens(tmp_path / "ml")
    log = open_log(ingest(IngestConfig(input=str(tmp_path / "ml")), tmp_path / "log"))
    assert raw_pairs(log, log.train) == [(1, 1193), (1, 661), (2, 1193), (7, 2)]
    data = read_all(log, log.train, ["label", "time"])
    assert data["label"].tolist() == [5, 3.5, 4, 0.5]
    assert data["time"].tolist() == [978300760, 978302109, 978301968, 978300275]
    assert (log.num_users, log.num_items) == (3, 3)  # the movie nobody rated is no id
    assert log.counts("user").tolist() == [2, 1, 1]
    assert log.counts("item").tolist() == [2, 1, 1]
    users, items = log.features("user"), log.features("item")
    genders = pq.read_table(tmp_path / "log/vocabulary/feature-gender.parquet").column("raw").to_pylist()
    assert [genders[k] for k in users.column("gender").to_pylist()] == ["F", "M", ""]
    genres = pq.read_table(tmp_path / "log/vocabulary/feature-genres.parquet").column("raw").to_pylist()
    named = [[genres[k] for k in row] for row in items.column("genres").to_pylist()]
    assert named == [["Drama"], ["Animation", "Children's"], []]
    years = items.column("year").to_numpy()
    assert years[:2].tolist() == [1975, 1996]
    assert np.isnan(years[2])


def test_movielens_csv(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n5,10,4.0,100\n3,10,2.5,200\n")
    (folder / "movies.csv").write_text('movieId,title,genres\n10,"American, The (1995)",Comedy|Drama\n')
    log = open_log(ingest(IngestConfig(input=str(folder)), tmp_path / "log"))
    assert raw_pairs(log, log.train) == [(5, 10), (3, 10)]
    assert log.features("item").column("year").to_pylist() == [1995]
    assert log.features("user") is None


def write_ncf(folder):
    folder.mkdir()
    (folder / "x.train.rating").write_text("0\t10\t4\t1\n0\t11\t5\t2\n3\t11\t1\t3\n")
    (folder / "x.test.rating").write_text("0\t12\t4\t9\n3\t10\t4\t9\n")
    (folder / "x.test.negative").write_text("(0,12)\t13\t14\n(3,10)\t12\t13\n")


@pytest.mark.parametrize("name", ["", "/x", "/x.train.rating"])
def test_ncf(tmp_path, name):
    write_ncf(tmp_path / "ncf")
    log = open_log(ingest(IngestConfig(input=f"{tmp_path}/ncf{name}"), tmp_path / "log"))
    assert raw_pairs(log, log.train) == [(0, 10), (0, 11), (3, 11)]
    assert raw_pairs(log, log.test) == [(0, 12), (3, 10)]
    data = next(iter_columns(log.test_negatives, ["user_id", "pos_item_id", "negatives"]))
    raw = log.vocabulary("item").column("raw").to_numpy()
    assert raw[data["negatives"].values].tolist() == [13, 14, 12, 13]
    assert data["negatives"].offsets.tolist() == [0, 2, 4]
    assert log.num_items == 5
    assert log.counts("item").tolist() == [1, 2, 0, 0, 0]  # of train alone


def test_lightgcn(tmp_path):
    folder = tmp_path / "gowalla"
    folder.mkdir()
    (folder / "train.txt").write_text("0 5 6 7\n1 6\n2 5 9 \n")
    (folder / "test.txt").write_text("0 9\n2 6 7\n")
    log = open_log(ingest(IngestConfig(input=str(folder)), tmp_path / "log"))
    assert raw_pairs(log, log.train) == [(0, 5), (0, 6), (0, 7), (1, 6), (2, 5), (2, 9)]
    assert raw_pairs(log, log.test) == [(0, 9), (2, 6), (2, 7)]
    assert log.test_negatives is None


def test_criteo(tmp_path):
    ints = ["1", "", "-2", *["3"] * 10]
    hexes = ["68fd1e64", "", *["a0"] * 24]
    lines = ["\t".join([label, *ints, *hexes]) for label in ("0", "1", "0")]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    out = ingest(IngestConfig(input=str(tmp_path / "train.txt")), tmp_path / "log")
    with pytest.raises(InputError, match="no user column"):
        open_log(out)
    log = open_log(out, pairs=False)
    data = next(iter_columns(log.train, ["label", "I1", "I2", "I3", "C1", "C2"]))
    assert data["label"].tolist() == [0, 1, 0]
    assert data["I1"].tolist() == [1, 1, 1]
    assert np.isnan(data["I2"]).all()
    assert data["I3"].tolist() == [-2, -2, -2]
    assert data["C2"].tolist() == [0, 0, 0]
    assert log.manifest["features"]["C2"]["num_ids"] == 1
    assert len(log.schema.categorical) == 26
    assert len(log.schema.floats) == 13


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
    assert raw_pairs(log, log.train) == [("ann", "tea"), ("bob", "milk")]
    assert raw_pairs(log, log.val) == [("ann", "milk")]
    assert raw_pairs(log, log.test) == [("cid", "tea")]
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
    assert raw_pairs(one, one.train) == raw_pairs(two, two.train) == [(7, 30), (8, 31), (7, 31)]
    assert one.vocabulary_fingerprint("user") == two.vocabulary_fingerprint("user")
    tags = next(iter_columns(two.train, ["tags"]))["tags"]
    assert tags.values.tolist() == [0, 1, 1]
    assert tags.offsets.tolist() == [0, 2, 2, 3]


def test_extend_keeps_numbers_and_adds_counts(tmp_path):
    write_movielens(tmp_path / "ml")
    old = open_log(ingest(IngestConfig(input=str(tmp_path / "ml")), tmp_path / "old"))
    later = tmp_path / "later"
    later.mkdir()
    (later / "ratings.dat").write_text("2::50::3::978400000\n99::1193::2::978400001\n")
    (later / "users.dat").write_text("99::F::25::1::11111\n")
    (later / "movies.dat").write_text("50::Usual Suspects (1995)::Drama\n")
    new = open_log(ingest(IngestConfig(input=str(later), extend=str(tmp_path / "old")), tmp_path / "new"))
    for side in ("user", "item"):
        before = old.vocabulary(side).column("raw").to_pylist()
        assert new.vocabulary(side).column("raw").to_pylist()[: len(before)] == before
    assert raw_pairs(new, new.train) == [(2, 50), (99, 1193)]
    assert new.counts("user").tolist() == [2, 2, 1, 1]
    assert new.counts("item").tolist() == [3, 1, 1, 1]
    genders = pq.read_table(tmp_path / "new/vocabulary/feature-gender.parquet").column("raw").to_pylist()
    assert [genders[k] for k in new.features("user").column("gender").to_pylist()] == ["F", "M", "", "F"]
    assert new.features("item").column("year").to_pylist()[0] == 1975
    assert new.manifest["extends"]["vocabularies"]["user"] == old.vocabulary_fingerprint("user")


def test_holdout_last(tmp_path):
    rows = [(user, item, 10 * user + item) for user in range(5) for item in range(4)]
    (tmp_path / "a.csv").write_text("user_id,item_id,t\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    config = IngestConfig(input=str(tmp_path / "a.csv"), time="t", holdout="last", negatives=0)
    log = open_log(ingest(config, tmp_path / "log"))
    assert sorted(raw_pairs(log, log.test)) == [(user, 3) for user in range(5)]
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
    assert raw_pairs(log, log.train) == [tuple(pair) for pair in pairs.tolist()]
    assert np.array_equal(log.counts("user"), np.bincount(read_all(log, log.train, ["user_id"])["user_id"]))


BAD = {
    "no format": ("a.xyz", "1,2\n", {}, r"a\.xyz: the names of the files show no format"),
    "missing column": (
        "a.csv",
        "user_id,thing\n1,2\n",
        {},
        r"a\.csv: no column 'item_id'; found user_id, thing",
    ),
    "null id": ("a.csv", "user_id,item_id\n1,2\n3,4\n,5\n", {}, r"a\.csv, row 2: no user_id"),
    "empty string id": ("a.csv", "user_id,item_id\na,x\nb,\n", {}, r"a\.csv, row 1: no item_id"),
    "not a number": (
        "a.csv",
        "user_id,item_id,r\n1,2,3\n1,3,good\n",
        {"label": "r"},
        r"a\.csv, column 'r', row 1: 'good'",
    ),
    "NaN label": (
        "a.csv",
        "user_id,item_id,r\n1,2,3\n1,3,nan\n",
        {"label": "r"},
        r"a\.csv, row 1: no label \(column 'r'\)",
    ),
    "no time": ("a.csv", "user_id,item_id,t\n1,2,x\n", {"time": "t"}, r"a\.csv, column 't', row 0: 'x'"),
    "fields": ("a.csv", "user_id,item_id\n1,2\n1\n", {}, r"a\.csv: .*Expected 2 columns, got 1"),
    "empty": ("a.csv", "", {}, r"a\.csv: empty; expected a header"),
    "no rows": ("a.csv", "user_id,item_id\n", {}, r"no rows for train"),
    "split": (
        "a.csv",
        "user_id,item_id,s\n1,2,train\n1,3,later\n",
        {"split_column": "s"},
        r"a\.csv, row 1: split 'later' \(column 's'\)",
    ),
    "null in a column of another name": (
        "a.csv",
        "who,item_id\n1,2\n,5\n",
        {"user": "who"},
        r"a\.csv, row 1: no user_id \(column 'who'\)",
    ),
    "truncated parquet": ("a.parquet", "PAR1....", {}, r"a\.parquet: "),
    "empty user": ("train.txt", "0 1 2\n1\n", {}, r"train\.txt, row 1: a user without items"),
    "bad token": ("train.txt", "0 1 2\n1 -4\n", {}, r"train\.txt, row 1: '-4'; expected ids >= 0"),
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
        r"column 'item_id' has two meanings",
    ),
    "nothing": ("a.csv", "user_id,item_id\n1,2\n", {"input": "nowhere.csv"}, r"nowhere\.csv: no such file"),
    "extend": ("a.csv", "user_id,item_id\n1,2\n", {"extend": "nowhere"}, r"nowhere: no such file"),
    "holdout": ("a.csv", "user_id,item_id\n1,2\n", {"holdout": "random"}, r"no user has two items"),
    "last": ("a.csv", "user_id,item_id\n1,2\n1,3\n", {"holdout": "last"}, r"needs a time column"),
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


def test_empty_users_can_be_skipped(tmp_path):
    (tmp_path / "train.txt").write_text("0 1 2\n1\n\n2 1\n")
    config = IngestConfig(input=str(tmp_path / "train.txt"), allow_empty_users=True)
    log = open_log(ingest(config, tmp_path / "log"))
    assert raw_pairs(log, log.train) == [(0, 1), (0, 2), (2, 1)]


def test_negatives_of_another_pair(tmp_path):
    write_ncf(tmp_path / "ncf")
    (tmp_path / "ncf/x.test.negative").write_text("(0,12)\t13\t14\n(3,11)\t12\t13\n")
    with pytest.raises(InputError, match=r"x\.test\.negative, rows 0 and on: item_id"):
        ingest(IngestConfig(input=str(tmp_path / "ncf")), tmp_path / "log")
    (tmp_path / "ncf/x.test.negative").write_text("(0,12)\t13\t14\n(3,10)\n")
    with pytest.raises(InputError, match=r"x\.test\.negative, row 1: expected \(user,item\)"):
        ingest(IngestConfig(input=str(tmp_path / "ncf")), tmp_path / "log")


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
