"""Batches hold every interaction once per epoch, within their limits."""

import numpy as np

from recpress.modules.als.interactions import CSR
from recpress.modules.contrastive.batches import BatchMaker, NegativeSampler


def csr(degrees, num_items, seed=0):
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(num_items, degree, replace=False)) for degree in degrees]
    indptr = np.concatenate(([0], np.cumsum(degrees)))
    return CSR(0, indptr, np.concatenate(rows).astype(np.int32))


def test_every_interaction_is_in_one_batch_also_of_users_beyond_the_limit():
    degrees = np.array([3, 0, 700, 257, 1, 128, 900])
    data = csr(degrees, 1000)
    weight = np.arange(7, dtype=np.float32) + 1
    sampler = NegativeSampler(np.bincount(data.indices, minlength=1000), 0.5)
    maker = BatchMaker(data, weight, sampler, negatives=50, most_users=3, most_positives=256)
    rng = np.random.default_rng(1)
    pairs = []
    for parts in maker.epoch(rng):
        batch = maker.make(parts, rng)
        assert len(batch.users) == len(set(batch.users)) <= 3
        assert len(batch.row) <= 256
        assert (np.diff(batch.items) > 0).all()
        items = batch.items[batch.positive]
        pairs += list(zip(batch.users[batch.row], items, strict=True))
        assert (batch.weight == weight[batch.users[batch.row]]).all()
        assert (np.diff(batch.indptr)[batch.row] > 0).all()
        # the same interactions by item
        assert (np.diff(batch.positive[batch.by_item]) >= 0).all()
        assert (np.repeat(batch.items, np.diff(batch.item_indptr)) == items[batch.by_item]).all()
    expected = [(user, item) for user in range(7) for item in data.indices[data.indptr[user] : data.indptr[user + 1]]]
    assert sorted(pairs) == sorted(expected)


def test_a_batch_of_no_users_is_empty():
    data = csr([3], 10)
    maker = BatchMaker(
        data, np.ones(1, np.float32), NegativeSampler(np.ones(10), 0.5), negatives=5, most_users=3, most_positives=256
    )
    batch = maker.make(np.empty(0, np.int64), np.random.default_rng(0))
    assert not len(batch.items)
    assert not len(batch.negative)


def test_negatives_follow_the_counts():
    counts = np.array([0, 1, 4, 16, 0, 100, 0])
    sampler = NegativeSampler(counts, 0.5)
    rng = np.random.default_rng(0)
    drawn = [sampler.draw(10, rng) for _ in range(4000)]
    found = np.bincount(np.concatenate([ids for ids, _ in drawn]), minlength=7) / len(drawn)
    expected = 10 * np.sqrt(counts) / np.sqrt(counts).sum()
    np.testing.assert_allclose(found, expected, atol=0.05)
    ids, log_expected = drawn[0]
    np.testing.assert_allclose(np.exp(log_expected), expected[ids], rtol=1e-5)
    assert sampler.num_items == 4
