"""Held-out cases: which there are, what is masked, and which rank has them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.trainer.evaluate import heldout as ho


def pairs(*values):
    users, items = zip(*values, strict=True) if values else ((), ())
    return np.array(users, dtype=np.int64), np.array(items, dtype=np.int32)


def lists(jagged):
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets[:-1], jagged.offsets[1:], strict=True)]


def test_sampled_cases_are_sorted_and_lose_their_own_item():
    negatives = Jagged(np.array([5, 6, 1, 0, 5, 6, 3, 1, 2]), np.array([0, 4, 7, 9]))
    found = ho.sampled_from_arrays(np.array([2, 0, 1]), np.array([5, 4, 0]), negatives, num_users=4, num_items=7)
    assert found.users.tolist() == [0, 1, 2]
    assert lists(found.targets) == [[4], [0], [5]]
    assert lists(found.negatives) == [[5, 6, 3], [1, 2], [6, 1, 0]]
    assert found.facts == {"users_skipped": 1, "negatives_dropped": 1}
    assert (found.num_cases, found.chunks_per_rank) == (3, 1)


def test_full_cases_mask_what_was_seen():
    held_out, seen = pairs((1, 5), (0, 4), (0, 1), (2, 3), (1, 5)), pairs((0, 6), (0, 5), (2, 3), (3, 0), (0, 6))
    found = ho.full_from_pairs(held_out, seen, num_users=4, num_items=7, chunk=1)
    assert found.users.tolist() == [0, 1]  # all that user 2 holds out was seen
    assert lists(found.targets) == [[1, 4], [5]]
    assert lists(found.seen) == [[5, 6], []]
    assert found.facts == {"users_skipped": 2, "users_without_train": 1, "heldout_repeated": 1, "heldout_seen": 1}
    assert (found.num_cases, found.chunks_per_rank) == (2, 2)


def test_cases_of_a_log_count_targets_that_train_lacks(tmp_path):
    for name, users, items in (("train", [0, 0, 1], [0, 1, 1]), ("val", [1], [0]), ("test", [0, 1, 2], [2, 2, 0])):
        pq.write_table(pa.table({"user_id": users, "item_id": items}), tmp_path / f"{name}.parquet")
    log = open_log(tmp_path)
    found = ho.full_from_log(log, masked=("train", "val"))
    assert (found.users.tolist(), lists(found.targets)) == ([0, 1, 2], [[2], [2], [0]])
    assert lists(found.seen) == [[0, 1], [0, 1], []]
    assert found.facts["targets_without_train"] == 2
    assert lists(ho.full_from_log(log, "val", ("train",)).targets) == [[0]]


def test_bad_heldout_is_refused():
    with pytest.raises(InputError, match="held-out item 9: outside the vocabulary"):
        ho.full_from_pairs(pairs((0, 9)), pairs(), num_users=3, num_items=9)
    with pytest.raises(InputError, match="negative item 9: outside"):
        ho.sampled_from_arrays(np.array([0]), np.array([1]), np.array([[9]]), num_users=3, num_items=9)
    with pytest.raises(InputError, match="held-out user 2: no negative"):
        ho.sampled_from_arrays(np.array([2]), np.array([1]), np.array([[1, 1]]), num_users=3, num_items=9)


def test_a_log_without_heldout_rows_is_refused(tmp_path):
    pq.write_table(pa.table({"user_id": [0], "item_id": [0]}), tmp_path / "train.parquet")
    log = open_log(tmp_path)
    with pytest.raises(InputError, match=r"no test\.parquet"):
        ho.full_from_log(log)
    with pytest.raises(InputError, match=r"no test_negatives\.parquet"):
        ho.sampled_from_log(log)
