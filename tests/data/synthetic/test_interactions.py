"""The made log: deterministic, streamed, learnable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import LayoutConfig, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.data.synthetic.interactions import SyntheticInteractions, synth
from recpress.data.synthetic.tastes import Permutation

SMALL = SynthConfig(users=300, items=400, rows=5000, tastes=8, negatives=20)


def columns(rows, names):
    parts = list(iter_columns(rows, names))
    return [np.concatenate([part[name] for part in parts]) for name in names]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    layout = LayoutConfig(rows_per_file=2000, row_group_rows=600)
    config = SynthConfig(**{**vars(SMALL), "layout": layout})
    return open_log(synth(config, tmp_path_factory.mktemp("synth") / "log"))


def test_sizes(log):
    assert (log.num_users, log.num_items, log.train.num_rows) == (300, 400, 5000)
    assert [file.metadata.num_rows for file in log.train.files] == [2000, 2000, 1000]
    assert log.test.num_rows == log.test_negatives.num_rows == 300
    assert log.features("user").num_rows == 300
    assert log.features("item").column_names == ["category", "genres", "price"]
    users, items, times = columns(log.train, ["user_id", "item_id", "time"])
    assert (np.diff(times) >= 0).all()
    assert users.max() < 300
    assert items.max() < 400


def test_no_pair_occurs_twice_and_held_out_ones_not_at_all(log):
    users, items = columns(log.train, ["user_id", "item_id"])
    pairs = users * 400 + items
    assert len(np.unique(pairs)) == 5000
    test_users, test_items, test_times = columns(log.test, ["user_id", "item_id", "time"])
    assert not np.isin(test_users * 400 + test_items, pairs).any()
    assert test_times.min() >= columns(log.train, ["time"])[0].max()
    negatives = next(iter_columns(log.test_negatives, ["user_id", "pos_item_id", "negatives"]))
    assert np.array_equal(negatives["user_id"], test_users)
    assert np.array_equal(negatives["pos_item_id"], test_items)
    drawn = negatives["negatives"].values.reshape(300, 20)
    assert not np.isin(test_users[:, None] * 400 + drawn, pairs).any()
    assert not (drawn == test_items[:, None]).any()
    assert all(len(set(row)) == 20 for row in drawn.tolist())


def test_deterministic_whatever_the_layout(log, tmp_path):
    for name in ("a", "b"):
        synth(SMALL, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    one = open_log(tmp_path / "a")
    for mine, other in zip(
        columns(one.train, ["user_id", "item_id", "time"]),
        columns(log.train, ["user_id", "item_id", "time"]),
        strict=True,
    ):
        assert np.array_equal(mine, other)
    seeded = SyntheticInteractions(SynthConfig(**{**vars(SMALL), "seed": 1})).train_rows(0, 5000)
    assert not np.array_equal(seeded.column("user_id").to_numpy(), columns(one.train, ["user_id"])[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_rows_depend_on_their_place_alone(a, b):
    made = SyntheticInteractions(SMALL)
    start, stop = min(a, b), max(a, b)
    assert made.train_rows(start, stop).equals(made.train_rows(0, 5000).slice(start, stop - start))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(6, 30),
    st.integers(1, 9),
    st.floats(0, 2),
    st.floats(0, 2),
    st.floats(0.1, 1),
    st.data(),
)
def test_no_pair_twice_for_any_sizes(users, tastes, per_taste, per_user, user_skew, item_skew, decay, data):
    items = tastes * per_taste + data.draw(st.integers(0, tastes - 1))
    most = (items // tastes) * min(per_user, tastes) // 3 - 1
    config = SynthConfig(
        users=users,
        items=items,
        rows=data.draw(st.integers(users, max(users * most, users))),
        tastes=tastes,
        tastes_per_user=per_user,
        taste_decay=decay,
        user_skew=user_skew,
        item_skew=item_skew,
        held_out_users=users // 2,
        negatives=2,
    )
    made = SyntheticInteractions(config)
    rows = made.train_rows(0, config.rows)
    pairs = rows.column("user_id").to_numpy().astype(np.int64) * items + rows.column("item_id").to_numpy()
    assert made.user_rows.sum() == config.rows
    assert np.array_equal(np.bincount(rows.column("user_id").to_numpy(), minlength=users), made.user_rows)
    for test, _ in made.held_out():
        pairs = np.append(pairs, test.column("user_id").to_numpy() * items + test.column("item_id").to_numpy())
    assert len(np.unique(pairs)) == len(pairs)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1024, 1025, 70_001])
def test_permutation(size):
    places = Permutation(size, 3)(np.arange(size, dtype=np.uint64))
    assert np.array_equal(np.sort(places), np.arange(size))
    if size > 1000:
        assert abs(np.corrcoef(places, np.arange(size))[0, 1]) < 0.1


def test_activity_and_popularity_are_skewed():
    made = SyntheticInteractions(SynthConfig())
    rows = made.train_rows(0, 500_000)
    popularity = np.sort(np.bincount(rows.column("item_id").to_numpy(), minlength=3000))[::-1]
    activity = np.sort(made.user_rows)[::-1]
    assert popularity[:300].sum() > 0.25 * 500_000  # a tenth of the items has more than a quarter of the rows
    assert activity[:600].sum() > 0.25 * 500_000
    assert popularity.min() > 0


def test_a_billion_rows_need_no_more_than_their_users_and_items():
    made = SyntheticInteractions(SynthConfig(users=2_000_000, items=20_000, rows=1_200_000_000, tastes=64))
    table = made.train_rows(1_199_990_000, 1_200_000_000)
    assert made.user_rows.sum() == 1_200_000_000
    assert table.num_rows == len(set(zip(*table.select([0, 1]).to_pydict().values(), strict=True))) == 10_000


def factorize(users, items, shape, factors=24, sweeps=8, alpha=3.0, regularization=10.0):
    """Implicit ALS (Hu, Koren, Volinsky 2008), dense normal equations, in plain numpy."""
    seen = np.zeros(shape, dtype=np.float32)
    seen[users, items] = 1
    vectors = np.random.default_rng(0).normal(0, 0.1, (shape[1], factors))
    for _ in range(sweeps):
        for matrix in (seen, seen.T):
            gram = vectors.T @ vectors + regularization * np.eye(factors)
            outer = np.einsum("nd,ne->nde", vectors, vectors).reshape(len(vectors), -1)
            left = gram + alpha * (matrix @ outer).reshape(-1, factors, factors)
            right = (1 + alpha) * (matrix @ vectors)
            previous, vectors = vectors, np.linalg.solve(left, right[:, :, None])[:, :, 0]
    return previous, vectors  # users, items


def test_factorization_beats_popularity_by_far(tmp_path):
    config = SynthConfig(users=1500, items=1200, rows=60_000, tastes=16)
    log = open_log(synth(config, tmp_path / "log"))
    users, items = columns(log.train, ["user_id", "item_id"])
    held = next(iter_columns(log.test_negatives, ["user_id", "pos_item_id", "negatives"]))
    candidates = np.column_stack([held["pos_item_id"], held["negatives"].values.reshape(-1, 99)])

    def hit_rate(scores):
        return ((scores[:, 1:] >= scores[:, :1]).sum(axis=1) < 10).mean()

    popularity = hit_rate(log.counts("item")[candidates])
    user_vectors, item_vectors = factorize(users, items, (1500, 1200))
    learned = hit_rate(np.einsum("nd,nkd->nk", user_vectors[held["user_id"]], item_vectors[candidates]))
    assert learned > popularity + 0.25, (learned, popularity)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 10**7}, "10000000 rows; expected 300 to"),
        ({"items": 40}, "40 items for 8 tastes"),
        ({"negatives": 400}, "400 negatives; at most"),
        ({"users": 0}, "users is 0; expected at least 1"),
        ({"taste_decay": 0.0}, r"taste_decay is 0\.0"),
        ({"user_skew": float("nan")}, "user_skew is nan"),
        ({"layout": LayoutConfig(row_group_rows=0)}, "row_group_rows=0"),
    ],
)
def test_sizes_that_do_not_go_together(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        synth(SynthConfig(**{**vars(SMALL), **change}), tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
