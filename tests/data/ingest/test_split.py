"""Leaving one interaction a user out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import IngestConfig, LayoutConfig, Schema, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.ingest.split import leave_one_out
from recpress.data.sampling.scan import iter_columns
from recpress.data.synthetic.interactions import synth


def columns(rows, names):
    parts = list(iter_columns(rows, names))
    return [np.concatenate([part[name] for part in parts]) for name in names]


def make_log(folder, users, items, row_group_size=7, **more):
    folder.mkdir()
    table = pa.table({"user_id": pa.array(users, pa.int32()), "item_id": pa.array(items, pa.int32()), **more})
    pq.write_table(table, folder / "train.parquet", row_group_size=row_group_size)
    return open_log(folder, Schema(time="t" if "t" in more else None))


def pairs(log, rows):
    users, items = columns(rows, ["user_id", "item_id"])
    return list(zip(users.tolist(), items.tolist(), strict=True))


def test_last_is_the_largest_time_and_of_equal_ones_the_later_row(tmp_path):
    log = make_log(
        tmp_path / "log",
        [0, 0, 1, 1, 1, 2, 3, 3],
        [5, 6, 1, 2, 3, 4, 8, 9],
        2,
        t=pa.array([9, 3, 7, 7, 1, 5, 2, 2]),
    )
    new = open_log(leave_one_out(log, tmp_path / "new", by="last", negatives=3))
    assert pairs(new, new.test) == [(0, 5), (1, 2), (3, 9)]  # user 2 has one row, which stays
    assert pairs(new, new.train) == [(0, 6), (1, 1), (1, 3), (2, 4), (3, 8)]
    assert columns(new.test, ["t"])[0].tolist() == [9, 7, 2]
    assert (new.num_users, new.num_items) == (log.num_users, log.num_items)
    assert new.vocabulary_fingerprint("item") == log.vocabulary_fingerprint("item")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 29)), min_size=1, max_size=60), st.integers(0, 3))
def test_random_loses_nothing_and_meets_nothing(tmp_path_factory, rows, seed):
    """Train and test are the rows of before, but for copies of left-out pairs; negatives were never met."""
    folder = tmp_path_factory.mktemp("holdout")
    users, items = zip(*rows, strict=True)
    log = make_log(folder / "log", users, [*items[:-1], 29])
    rows = pairs(log, log.train)
    able = {u for u, _ in rows if len({i for v, i in rows if v == u}) > 1}
    able = {u for u in able if 30 - len({i for v, i in rows if v == u}) >= 15}
    if not able:
        with pytest.raises(InputError, match="no user has two items, and 15 of 30 items"):
            leave_one_out(log, folder / "new", by="random", seed=seed, negatives=15)
        assert [path.name for path in folder.iterdir()] == ["log"]
        return
    new = open_log(leave_one_out(log, folder / "new", by="random", seed=seed, negatives=15))
    test, train = pairs(new, new.test), pairs(new, new.train)
    held = dict(test)
    # Every user takes part who can, unless all its rows are copies of the chosen pair.
    assert set(held) == able
    assert train == [(u, i) for u, i in rows if held.get(u) != i]
    data = next(iter_columns(new.test_negatives, ["user_id", "pos_item_id", "negatives"]))
    assert list(zip(data["user_id"].tolist(), data["pos_item_id"].tolist(), strict=True)) == test
    for user, negatives in zip(
        data["user_id"].tolist(), data["negatives"].values.reshape(-1, 15).tolist(), strict=True
    ):
        assert len(set(negatives)) == 15
        assert not set(negatives) & {i for u, i in rows if u == user}


def test_random_is_uniform_over_the_rows_and_deterministic(tmp_path):
    users = np.repeat(np.arange(4000), 5)
    log = make_log(tmp_path / "log", users, np.tile(np.arange(5), 4000), 999)
    chosen = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        new = open_log(leave_one_out(log, tmp_path / name, by="random", seed=seed, negatives=0))
        assert new.test_negatives is None
        chosen.append(columns(new.test, ["item_id"])[0])
    assert np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])
    assert (np.abs(np.bincount(chosen[0]) - 800) < 5 * np.sqrt(800 * 0.8)).all()


def test_at_most_so_many_users(tmp_path):
    log = open_log(synth(SynthConfig(users=200, items=300, rows=3000, tastes=5), tmp_path / "log"))
    new = open_log(leave_one_out(log, tmp_path / "new", by="last", max_users=30, negatives=50))
    users = columns(new.test, ["user_id"])[0]
    assert len(set(users.tolist())) == 30
    assert users.max() > 100  # drawn, not the first
    assert new.train.num_rows == 3000 - 30
    assert new.features("item").equals(log.features("item"))
    assert new.schema == log.schema


def test_negatives_are_uniform_over_unmet_items(tmp_path):
    log = make_log(tmp_path / "log", np.repeat(np.arange(3000), 3), np.tile([0, 1, 39], 3000), 4000)
    new = open_log(leave_one_out(log, tmp_path / "new", by="random", negatives=10))
    counts = np.bincount(next(iter_columns(new.test_negatives, ["negatives"]))["negatives"].values, minlength=40)
    assert counts[[0, 1, 39]].tolist() == [0, 0, 0]
    expected = 3000 * 10 / 37
    assert (np.abs(counts[2:39] - expected) < 5 * np.sqrt(expected)).all()


def test_users_that_met_almost_everything(tmp_path):
    """All unmet items are found, however many draws it takes."""
    log = make_log(tmp_path / "log", np.repeat([0, 1], [95, 2]), [*range(95), 0, 99])
    new = open_log(leave_one_out(log, tmp_path / "new", by="random", negatives=5))
    data = next(iter_columns(new.test_negatives, ["negatives"]))["negatives"]
    assert data.values[:5].tolist() == [95, 96, 97, 98, 99]


def test_vocabulary_counts_lose_what_left_train(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\na,x\na,y\nb,x\nb,z\nb,z\n")
    log = open_log(ingest(IngestConfig(input=str(tmp_path / "a.csv")), tmp_path / "log"))
    new = open_log(
        leave_one_out(log, tmp_path / "new", by="random", negatives=1, layout=LayoutConfig(row_group_rows=2))
    )
    for side in ("user", "item"):
        again = np.bincount(columns(new.train, [f"{side}_id"])[0], minlength=new.num_ids(side))
        assert new.counts(side).tolist() == again.tolist()
        assert new.vocabulary(side).column("raw") == log.vocabulary(side).column("raw")
        assert new.vocabulary_fingerprint(side) == log.vocabulary_fingerprint(side)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "last"}, "needs a time column"),
        ({"by": "random", "negatives": -1}, "negatives is -1"),
        ({"by": "random", "negatives": 1, "max_users": 0}, "max_users is 0"),
        ({"by": "random", "negatives": 99}, "no user has two items, and 99 of 10 items"),
    ],
)
def test_what_cannot_be_done(tmp_path, options, message):
    log = make_log(tmp_path / "log", [0, 0, 1, 1], [0, 1, 2, 9])
    with pytest.raises(InputError, match=message):
        leave_one_out(log, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_repeated_pairs_are_one_item(tmp_path):
    """A user's rows may be more than the items of the log."""
    users = np.concatenate([np.zeros(150), np.ones(30), 2 + np.arange(200) % 40, np.full(500, 42)]).astype(int)
    items = np.concatenate([np.arange(150) % 5, np.arange(30), np.arange(200), np.arange(500) % 120]).astype(int)
    log = make_log(tmp_path / "log", users, items, 60)
    new = open_log(leave_one_out(log, tmp_path / "new", by="random", negatives=99))
    test = dict(pairs(new, new.test))
    assert set(test) == set(range(42))  # user 42 has met 120 of 200 items
    assert new.manifest["held_out"] == {"users": 42, "left_out": 1}
    data = next(iter_columns(new.test_negatives, ["user_id", "negatives"]))
    for user, negatives in zip(data["user_id"].tolist(), data["negatives"].values.reshape(-1, 99), strict=True):
        assert len(set(negatives.tolist())) == 99
        assert not set(negatives.tolist()) & set(items[users == user].tolist())


def test_users_who_met_almost_all_items_draw_uniformly_from_the_rest_in_one_pass(tmp_path):
    most = np.delete(np.arange(400), np.arange(3, 400, 8))  # 50 are left
    log = make_log(tmp_path / "log", np.repeat(np.arange(600), len(most)), np.tile(most, 600), 1 << 20)
    new = open_log(leave_one_out(log, tmp_path / "new", by="random", negatives=10))
    counts = np.bincount(next(iter_columns(new.test_negatives, ["negatives"]))["negatives"].values, minlength=400)
    assert counts[most].sum() == 0
    assert (np.abs(counts[3::8] - 120) < 5 * np.sqrt(120)).all()


def test_columns_that_the_schema_does_not_name_stay(tmp_path, caplog):
    (tmp_path / "log" / "train").mkdir(parents=True)
    own = {
        "user_id": pa.array([0, 0, 1, 1], pa.uint16()),
        "text": pa.array(["a", None, "b", "c"], pa.string_view()),
        "deep": [{"x": [k]} for k in range(4)],
        "item_id": [0, 1, 2, 3],
        "key": pa.array(["p", "q", "p", "q"]).dictionary_encode(),
    }
    pq.write_table(pa.table({**own, "gone": [1] * 4}), tmp_path / "log" / "train" / "a.parquet")
    pq.write_table(pa.table(own), tmp_path / "log" / "train" / "b.parquet")
    log = open_log(tmp_path / "log")
    new = open_log(leave_one_out(log, tmp_path / "new", by="random", negatives=1))
    names = ["user_id", "text", "deep", "item_id", "key"]
    expected = [row for row in pa.table(own).to_pylist()]
    for part in (new.train, new.test):
        for group in part.groups:
            table = part.read_table(group, names)
            assert part.files[group.file].schema.names == names
            assert all(row in expected for row in table.to_pylist())
    assert "gone" in caplog.text
