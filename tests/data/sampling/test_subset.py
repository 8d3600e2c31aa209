"""Subsets that are no random samples: their rows by known answers, and the log that is written of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import Schema
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.subset import by_popularity, choose_rows, densest_core, write_subset


def rng(seed=0):
    return np.random.default_rng(seed)


def clique_and_tail():
    """Users 0 to 3 have all of items 0 to 4 (a 4-core of 20 rows); a ring of users 4 to 9 and items 5 to 10 is a 2-core
    of 12 rows; users 10 to 19 have one row each."""
    clique = [(u, i) for u in range(4) for i in range(5)]
    ring = [(4 + j, 5 + (j + step) % 6) for j in range(6) for step in (0, 1)]
    tail = [(10 + j, 0) for j in range(10)]
    pairs = np.array(clique + ring + tail)[rng().permutation(42)]
    return pairs[:, 0], pairs[:, 1]


@pytest.mark.parametrize(("size", "cores"), [(20, (20, 0, 0)), (26, (20, 6, 0)), (32, (20, 12, 0)), (35, (20, 12, 3))])
def test_the_densest_core_is_filled_from_the_next_one(size, cores):
    users, items = clique_and_tail()
    rows = densest_core(users, items, size, rng())
    assert len(np.unique(rows)) == len(rows) == size
    chosen = users[rows]
    assert ((chosen < 4).sum(), ((chosen >= 4) & (chosen < 10)).sum(), (chosen >= 10).sum()) == cores


def test_a_part_of_one_core_is_drawn_from_it_at_random():
    users, items = clique_and_tail()
    drawn = [set(densest_core(users, items, 5, rng(seed)).tolist()) for seed in range(20)]
    assert all((users[list(rows)] < 4).all() for rows in drawn)
    assert len(set.union(*drawn)) > 15


def test_popular_items_are_drawn_in_proportion_to_their_count():
    items = np.repeat([0, 1, 2], [300, 100, 10])
    drawn = np.concatenate([items[by_popularity(items, 1, rng(seed))] for seed in range(3000)])
    shares = np.bincount(drawn, minlength=3) / 3000
    weights = np.array([300.0**2, 100.0**2, 10.0**2])  # rows x count
    assert shares == pytest.approx(weights / weights.sum(), abs=0.02)
    assert len(np.unique(by_popularity(items, 200, rng()))) == 200


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    row = np.arange(200)
    columns = {"user_id": row % 20, "item_id": row * 7 % 31, "time": (row * 37) % 200, "label": np.ones(200)}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=30)
    pq.write_table(
        pa.table({"user_id": [0, 1], "item_id": [30, 29], "time": [0, 0], "label": [1.0, 1.0]}), folder / "val.parquet"
    )
    pq.write_table(
        pa.table({"user_id": [0, 1], "item_id": [29, 28], "time": [0, 0], "label": [1.0, 1.0]}), folder / "test.parquet"
    )
    pq.write_table(pa.table({"item_id": np.arange(31), "color": np.arange(31)}), folder / "items.parquet")
    return open_log(folder, Schema(time="time", label="label"))


def pairs(path, part):
    table = pq.read_table(f"{path}/{part}")
    return sorted(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


@pytest.mark.parametrize("kind", ["core", "recent", "popular"])
def test_the_written_log_has_the_subset_and_masks_the_rest(log, kind, tmp_path):
    chosen = choose_rows(log, kind, 0.1, seed=3)
    assert (chosen.dtype, len(chosen), int(chosen.sum())) == (bool, 200, 20)
    assert (chosen == choose_rows(log, kind, 0.1, seed=3)).all()
    write_subset(log, tmp_path / "out", chosen, made_by="test")
    made = open_log(tmp_path / "out", None)
    assert (made.num_users, made.num_items, made.schema) == (log.num_users, log.num_items, log.schema)
    assert made.vocabulary_fingerprint("item") == log.vocabulary_fingerprint("item")
    assert not made.is_part
    assert (tmp_path / "out" / "items.parquet").read_bytes() == (tmp_path / "log" / "items.parquet").read_bytes()
    whole = pq.read_table(tmp_path / "log" / "train.parquet")
    train = pq.read_table(tmp_path / "out" / "train")
    assert train.equals(whole.filter(pa.array(chosen)))
    assert sorted(pairs(tmp_path / "out", "train") + pairs(tmp_path / "out", "val")) == sorted(
        [*pairs(tmp_path / "log", "train.parquet"), (0, 30), (1, 29)]
    )
    assert made.test is not None
    assert made.test.num_rows == 2


def test_recent_rows_are_the_latest(log):
    chosen = choose_rows(log, "recent", 0.25)
    times = (np.arange(200) * 37) % 200
    assert sorted(times[chosen].tolist()) == list(range(150, 200))


def test_equal_times_are_drawn_by_the_seed(tmp_path):
    columns = {"user_id": np.arange(100), "item_id": np.arange(100), "time": np.repeat([1, 2], 50)}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    log = open_log(tmp_path / "log.parquet", Schema(time="time"))
    first, second = (choose_rows(log, "recent", 0.2, seed) for seed in (0, 1))
    assert not first[:50].any()
    assert (first != second).any()


def test_recent_needs_a_time_column(tmp_path):
    pq.write_table(pa.table({"user_id": [0, 1], "item_id": [0, 1]}), tmp_path / "log.parquet")
    with pytest.raises(InputError, match="need a time column"):
        choose_rows(open_log(tmp_path / "log.parquet", None), "recent", 0.5)
