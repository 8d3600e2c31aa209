"""The formats of public data sets."""

import gzip

import numpy as np
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.sampling.scan import iter_columns
from tests.data.ingest.ingest_cases import made, raw_rows, read_all, refused, write

ML_1M = "1::1193::5::978300760\n1::661::3.5::978302109\n2::1193::4::978301968\n7::2::0.5::978300275\n"


def write_movielens(folder):
    folder.mkdir()
    (folder / "ratings.dat").write_text(ML_1M)
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    movies = "1193::One Flew: Over the Nest (1975)::Drama\n661::Giant Peach (1996)::Animation|Children's\n"
    (folder / "movies.dat").write_bytes((movies + "9::Café (1999)::Drama\n").encode("latin-1"))


def test_movielens_dat_with_side_tables(tmp_path):
    write_movielens(tmp_path / "ml")
    log = open_log(ingest(IngestConfig(input=str(tmp_path / "ml")), tmp_path / "log"))
    assert raw_rows(log) == [(1, 1193), (1, 661), (2, 1193), (7, 2)]
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
    assert raw_rows(log) == [(5, 10), (3, 10)]
    assert log.features("item").column("year").to_pylist() == [1995]
    assert log.features("user") is None


def test_companion_files_without_rows_are_refused(tmp_path):
    movielens, ncf = tmp_path / "ml", tmp_path / "ncf"
    movielens.mkdir()
    (movielens / "ratings.csv").write_text("userId,movieId,rating,timestamp\n5,10,4.0,100\n")
    (movielens / "movies.csv").write_text("movieId,title,genres\n")
    ncf.mkdir()
    (ncf / "x.train.rating").write_text("0\t10\t4\t100\n")
    (ncf / "x.test.rating").write_text("")
    (ncf / "x.test.negative").write_text("(0,12)\t13\t14\n")
    for folder, name in ((movielens, "movies.csv"), (ncf, "x.test.rating")):
        with pytest.raises(InputError, match=rf"{name}.*(no rows|Empty)"):
            ingest(IngestConfig(input=str(folder)), tmp_path / "log")
        assert not (tmp_path / "log").exists()


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
    assert raw_rows(new) == [(2, 50), (99, 1193)]
    assert new.counts("user").tolist() == [2, 2, 1, 1]
    assert new.counts("item").tolist() == [3, 1, 1, 1]
    genders = pq.read_table(tmp_path / "new/vocabulary/feature-gender.parquet").column("raw").to_pylist()
    assert [genders[k] for k in new.features("user").column("gender").to_pylist()] == ["F", "M", "", "F"]
    assert new.features("item").column("year").to_pylist()[0] == 1975
    assert new.manifest["extends"]["vocabularies"]["user"] == old.vocabulary_fingerprint("user")


def write_ncf(folder):
    folder.mkdir()
    (folder / "x.train.rating").write_text("0\t10\t4\t1\n0\t11\t5\t2\n3\t11\t1\t3\n")
    (folder / "x.test.rating").write_text("0\t12\t4\t9\n3\t10\t4\t9\n")
    (folder / "x.test.negative").write_text("(0,12)\t13\t14\n(3,10)\t12\t13\n")


@pytest.mark.parametrize("name", ["", "/x", "/x.train.rating"])
def test_ncf(tmp_path, name):
    write_ncf(tmp_path / "ncf")
    log = open_log(ingest(IngestConfig(input=f"{tmp_path}/ncf{name}"), tmp_path / "log"))
    assert raw_rows(log) == [(0, 10), (0, 11), (3, 11)]
    assert raw_rows(log, part="test") == [(0, 12), (3, 10)]
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
    assert raw_rows(log) == [(0, 5), (0, 6), (0, 7), (1, 6), (2, 5), (2, 9)]
    assert raw_rows(log, part="test") == [(0, 9), (2, 6), (2, 7)]
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


def test_empty_users_can_be_skipped(tmp_path):
    (tmp_path / "train.txt").write_text("0 1 2\n1\n\n2 1\n")
    config = IngestConfig(input=str(tmp_path / "train.txt"), allow_empty_users=True)
    log = open_log(ingest(config, tmp_path / "log"))
    assert raw_rows(log) == [(0, 1), (0, 2), (2, 1)]


def test_negatives_of_another_pair(tmp_path):
    write_ncf(tmp_path / "ncf")
    (tmp_path / "ncf/x.test.negative").write_text("(0,12)\t13\t14\n(3,11)\t12\t13\n")
    with pytest.raises(
        InputError, match=r"x\.test\.negative, line 2: item_id 11; expected 10, as in .*x\.test\.rating"
    ):
        ingest(IngestConfig(input=str(tmp_path / "ncf")), tmp_path / "log")
    (tmp_path / "ncf/x.test.negative").write_text("(0,12)\t13\t14\n(3,10)\n")
    with pytest.raises(InputError, match=r"x\.test\.negative, line 2: expected \(user,item\)"):
        ingest(IngestConfig(input=str(tmp_path / "ncf")), tmp_path / "log")


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
        ({"ratings__dat": "1:x:10::4::1\n"}, ["ratings.dat, line 1"]),
        ({"ratings__dat": RATINGS + "x::10::1::2\n"}, ["ratings.dat", "line 3", "'x'"]),
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
    refused(write(tmp_path / "head", train__txt=header + "0\t" + line), tmp_path, "train.txt", "line 1", "'label'")
    wide = "user_id\titem_id\t" + "\t".join(f"c{k}" for k in range(38)) + "\n" + "\t".join(["1"] * 40) + "\n"
    log = made(write(tmp_path / "wide", a__tsv=wide), tmp_path)
    assert raw_rows(log) == [(1, 1)]  # 40 columns do not make it Criteo's
