"""The top K of blocks of users against all scores in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.recommend import top_items
from recpress.trainer.recommend.top_items import ItemsByNorm, TopItems, _Finder

CHUNK, BLOCK = 64, (7, 128)


def shard_of(items):
    return ItemsByNorm(vectors_from_factors(items), len(items), CHUNK, torch.device("cpu"))


def expected(users, items, seen, k):
    """(scores, items) in float64: by falling score, rounded to float32, then by item."""
    scores = (users.astype(np.float64) @ items.astype(np.float64).T).astype(np.float32)
    scores[seen] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def check(users, items, seen, k):
    rows, omitted = seen  # by row
    lengths = np.bincount(rows, minlength=len(users))
    found = TopItems(shard_of(items), k, BLOCK)(torch.from_numpy(users), lengths, omitted)
    scores, order = expected(users, items, seen, k)
    present = scores > -np.inf
    np.testing.assert_array_equal(found[0].numpy(), scores)
    np.testing.assert_array_equal(found[1].numpy()[present], order[present])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 600),
    k=st.integers(1, 90),
    kind=st.sampled_from(["normal", "ties", "copies"]),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_the_best_items_in_order(seed, num_items, k, kind, share):
    """Any number of blocks; users who have seen all but a few items; equal scores; vectors that items share."""
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(n, 8)).astype(np.float32) for n in (12, num_items))
    if kind == "ties":
        users, items = users.round(), items.round()
        users[0] = 0
    if kind == "copies":
        items = items[rng.integers(0, min(5, num_items), num_items)]
    check(users, items, np.nonzero(rng.random((12, num_items)) < share), min(k, num_items))


def test_items_that_float32_cannot_tell_apart(monkeypatch):
    """The float32 scores of all items are equal up to rounding: only float64 knows the best."""
    rng = np.random.default_rng(0)
    users = np.ones((4, 8), np.float32)
    items = np.full((1000, 8), 4096, np.float32)
    items[:, 1:] += rng.integers(-4, 5, (1000, 7)) * np.float32(2**-11)
    items[:, 0] = 8192 - items[:, 1]  # sums differ by less than float32 resolves
    again = []
    score_again = _Finder._again
    monkeypatch.setattr(_Finder, "_again", lambda self, *args: again.append(1) or score_again(self, *args))
    check(users, items, (np.array([0, 2]), np.array([3, 999])), 10)
    assert again


def test_usual_scores_need_no_second_time(monkeypatch):
    monkeypatch.delattr(_Finder, "_again")
    rng = np.random.default_rng(1)
    users, items = (rng.normal(size=(n, 16)).astype(np.float32) for n in (40, 900))
    check(users, items, np.nonzero(rng.random((40, 900)) < 0.05), 20)


@pytest.mark.parametrize("k", [10, 1000])
def test_more_items_than_there_are(k):
    top = TopItems(shard_of(np.eye(8, dtype=np.float32)), k)
    scores, items = top(torch.ones(1, 8), np.array([1]), np.array([4]))
    assert items[0, :7].tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert scores[0].tolist() == [1.0] * 7 + [-torch.inf] * (k - 7)


def test_threads_find_the_same_and_leave_the_number_of_threads():
    rng = np.random.default_rng(2)
    users, items = (torch.from_numpy(rng.normal(size=(n, 8)).astype(np.float32)) for n in (50, 500))
    nothing = np.zeros(50, int), np.empty(0, int)
    alone = TopItems(shard_of(items), 9, BLOCK)(users, *nothing)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = TopItems(shard_of(items), 9, BLOCK)(users, *nothing)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32]])
def test_every_precision_gives_the_same(dtypes, monkeypatch):
    """Also where bfloat16 is given up, because it cannot tell apart the items of most users."""
    monkeypatch.setattr(top_items, "_dtypes", lambda device: dtypes)
    monkeypatch.setattr(top_items, "_TRIES", 20)
    rng = np.random.default_rng(3)
    users, items = (rng.normal(size=(n, 16)).astype(np.float32) for n in (64, 900))
    seen = np.nonzero(rng.random((64, 900)) < 0.1)
    check(users, items, seen, 20)
    check(users, 1 + items * np.float32(1e-4), seen, 20)
