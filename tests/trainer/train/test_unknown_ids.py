"""Rows with ids that a map does not know are counted when they are trained on."""

import torch

from recpress.data.stream.batch import ITEM, USER, Batch
from recpress.trainer.train.unknown_ids import UnknownIds
from tests.ranks import run_on_ranks
from tests.trainer.small import keyed


def batch(users, items):
    rows = len(users)
    negatives = [99] * rows  # never counted
    return Batch(keyed(USER, torch.tensor(users)), keyed(ITEM, torch.tensor(items + negatives)), torch.ones(rows), None)


def counts():
    unknown = UnknownIds({"user": 10, "item": 5})
    unknown.batch_taken(batch([1, 10, 11], [1, 2, 3]))
    unknown.batch_taken(batch([12, 13, 14], [7, 8, 9]))
    unknown.batch_trained()
    unknown.batches_dropped()
    first = dict(unknown.reduce())
    unknown.restore({"user": 100, "other": 3})
    return first, unknown.total


def test_only_what_was_trained_on_counts_on_all_ranks():
    assert run_on_ranks(counts, 2) == [({"user": 4, "item": 0}, {"user": 100, "item": 0})] * 2
