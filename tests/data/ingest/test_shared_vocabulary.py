"""Columns that share one vocabulary: a raw id has one number in all of them, and each column its own counts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig, SampleConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.ingest.split import leave_one_out
from recpress.data.sampling.sample import write_sample

ITEMS = ["a7", "b2", "a7", "c9"]
HISTORY = [[], ["a7"], ["x1", "b2"], ["a7", "a7", "c9"]]


def raw(folder, items=ITEMS, history=HISTORY, **more):
    folder.mkdir()
    table = {"user_id": ["u", "v", "u", "w"], "item_id": items, "history": history, **more}
    pq.write_table(pa.table(table), folder / "clicks.parquet", row_group_size=2)
    return str(folder / "clicks.parquet")


def config(path, *same, categorical=("history",), **more):
    return IngestConfig(input=path, categorical=categorical, same=same or ("item_id=history",), **more)


def in_words(log, folder, column):
    """The column of train with the raw ids that its own vocabulary has."""
    words = pq.read_table(folder / "vocabulary" / f"feature-{column}.parquet").column("raw").to_pylist()
    values = pq.read_table(log.train.files[0].path).column(column).to_pylist()
    return [[words[k] for k in row] if isinstance(row, list) else words[row] for row in values]


@pytest.mark.parametrize("integers", [False, True])
def test_a_list_and_the_item_share_their_ids(tmp_path, integers):
    number = {"a7": 700, "b2": 2, "c9": 2**62, "x1": 9}
    items = [number[k] for k in ITEMS] if integers else ITEMS
    history = [[number[k] for k in row] for row in HISTORY] if integers else HISTORY
    log = open_log(ingest(config(raw(tmp_path / "raw", items, history)), tmp_path / "log"))
    words = log.vocabulary("item").column("raw").to_pylist()
    assert in_words(log, tmp_path / "log", "history") == history
    train = pq.read_table(log.train.files[0].path)
    assert [words[k] for k in train.column("item_id").to_pylist()] == items
    assert [[words[k] for k in row] for row in train.column("history").to_pylist()] == history
    assert log.num_items == 4  # the one that only the history names, too
    assert log.counts("item").tolist() == [2, 1, 1, 0]
    table = pq.read_table(tmp_path / "log/vocabulary/feature-history.parquet")
    assert table.column("raw").to_pylist() == words
    assert dict(zip(words, table.column("count").to_pylist(), strict=True)) == {
        key: sum(row.count(key) for row in history) for key in words
    }
    assert log.train.columns["history"].limit == 4


def test_integers_in_one_column_become_strings_with_the_other(tmp_path):
    """JSON and CSV have no types: the vocabulary of both is one of strings as soon as either needs it."""
    (tmp_path / "log.csv").write_text("user_id,item_id,last\n1,7,7\n2,8,b\n1,007,8\n")
    log = open_log(ingest(config(str(tmp_path / "log.csv"), "item_id=last", categorical=("last",)), tmp_path / "log"))
    assert in_words(log, tmp_path / "log", "last") == ["7", "b", "8"]
    assert log.vocabulary("item").column("raw").to_pylist() == ["7", "8", "007", "b"]


def test_two_categorical_columns_share_and_missing_is_one_value(tmp_path):
    path = raw(tmp_path / "raw", city=["x", None, "y", "z"], home=["y", "x", None, "q"])
    made = config(path, "city=home", categorical=("home", "city"))
    log = open_log(ingest(made, tmp_path / "log"))
    assert in_words(log, tmp_path / "log", "city") == ["x", "", "y", "z"]
    assert in_words(log, tmp_path / "log", "home") == ["y", "x", "", "q"]
    one, other = (
        pq.read_table(tmp_path / f"log/vocabulary/feature-{name}.parquet").to_pydict() for name in ("city", "home")
    )
    assert one["raw"] == other["raw"]
    assert dict(zip(one["raw"], one["count"], strict=True)) == {"x": 1, "": 1, "y": 1, "z": 1, "q": 0}


def test_the_next_day_extends_a_shared_vocabulary(tmp_path):
    first = tmp_path / "first"
    ingest(config(raw(tmp_path / "raw")), first)
    path = raw(tmp_path / "more", ["n1", "b2", "n1", "x1"], [["n2"], ["a7"], [], ["c9"]])
    plain = IngestConfig(input=path, categorical=("history",), extend=str(first))  # what it shares is in the manifest
    log = open_log(ingest(plain, tmp_path / "next"))
    old = open_log(first).vocabulary("item").column("raw").to_pylist()
    assert log.vocabulary("item").column("raw").to_pylist() == [*old, "n1", "n2"]
    assert in_words(log, tmp_path / "next", "history") == [["n2"], ["a7"], [], ["c9"]]
    table = pq.read_table(tmp_path / "next/vocabulary/feature-history.parquet").to_pydict()
    assert dict(zip(table["raw"], table["count"], strict=True)) == {
        "a7": 4, "b2": 1, "c9": 2, "x1": 1, "n1": 0, "n2": 1
    }  # fmt: skip
    ingest(IngestConfig(input=path, categorical=("history",)), tmp_path / "own")
    with pytest.raises(InputError, match="'history' has its own vocabulary"):
        ingest(config(path, extend=str(tmp_path / "own")), tmp_path / "out")


def test_split_and_sample_have_the_shared_vocabulary(tmp_path):
    log = open_log(ingest(config(raw(tmp_path / "raw", ["a7", "b2", "c9", "a7"])), tmp_path / "log"))
    want = (tmp_path / "log/vocabulary/feature-history.parquet").read_bytes()
    for made in (
        leave_one_out(log, tmp_path / "split", by="random", seed=0, negatives=1),
        write_sample(log, tmp_path / "sample", SampleConfig(rate=0.9, seed=1)),
    ):
        again = open_log(made)
        assert again.manifest["features"]["history"]["same"] == "item_id"
        assert (tmp_path / again.path / "vocabulary/feature-history.parquet").read_bytes() == want


@pytest.mark.parametrize(
    ("same", "message"),
    [
        ("history", "expected COLUMN=COLUMN"),
        ("item_id=shop", "no column 'shop' with ids; expected .*user_id, item_id, history"),
        ("item_id=user_id", "users and items cannot share"),
        ("history=history", "'history' is named twice"),
    ],
)
def test_columns_that_cannot_share(tmp_path, same, message):
    with pytest.raises(InputError, match=message):
        ingest(config(raw(tmp_path / "raw"), same), tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_two_groups_with_one_column(tmp_path):
    with pytest.raises(InputError, match="'history' is named twice"):
        ingest(config(raw(tmp_path / "raw"), "item_id=history", "user_id=history"), tmp_path / "log")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([[], ["a7"], ["x1", None], ["c9"]], r"column 'history', row 2: no id; expected one"),
        ([[], [], [3], []], r"column 'history': ids are of type number, those in .*'item_id' of type text"),
    ],
)
def test_values_that_are_no_items_are_named_by_row(tmp_path, history, message):
    with pytest.raises(InputError, match=message):
        ingest(config(raw(tmp_path / "raw", history=history)), tmp_path / "log")


def test_without_same_each_column_has_its_own_numbers(tmp_path):
    path = raw(tmp_path / "raw")
    log = open_log(ingest(IngestConfig(input=path, categorical=("history",)), tmp_path / "log"))
    assert log.num_items == 3
    assert in_words(log, tmp_path / "log", "history") == HISTORY
