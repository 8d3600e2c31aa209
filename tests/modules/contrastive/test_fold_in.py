"""Users and items that are folded in rank like those of the factorization."""

import numpy as np
import pytest
import torch

from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import Contrastive
from recpress.modules.contrastive.fold_in import fold_in

CONFIG = ContrastiveConfig(factors=8, epochs=30, batch_users=16, negatives=64)
USERS, ITEMS, GROUPS = 80, 60, 4


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, 3000)
    items = rng.integers(0, ITEMS // GROUPS, 3000) * GROUPS + users % GROUPS
    model = Contrastive(CONFIG, USERS, ITEMS)
    model.add(users, items)
    pairs = np.unique(users * ITEMS + items)
    return model.fit(), pairs // ITEMS, pairs % ITEMS


def as_csr(rows, columns, num_rows):
    order = np.argsort(rows, kind="stable")
    return np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=num_rows)))), columns[order]


@pytest.mark.parametrize("side", ["user", "item"])
def test_known_rows_come_out_near_their_own_vectors(fitted, side):
    factors, users, items = fitted
    own, others, counts = factors.users, factors.items, factors.item_counts
    rows, columns, count = users, items, USERS
    if side == "item":
        own, others, counts = factors.items, factors.users, factors.user_counts
        rows, columns, count = items, users, ITEMS
    indptr, indices = as_csr(rows, columns, count)
    found = fold_in(CONFIG, others, indptr, indices, other_counts=counts.numpy(), side=side)
    assert float(torch.cosine_similarity(found, own).mean()) > 0.7
    torch.testing.assert_close(found.norm(dim=1), own.norm(dim=1))
    group = torch.arange(count) % GROUPS
    best = (found @ torch.nn.functional.normalize(own).T).fill_diagonal_(-1).argmax(1) % GROUPS
    assert float((best == group).float().mean()) > 0.95


def test_a_row_depends_on_itself_only_and_unknown_ids_are_ignored(fitted):
    factors = fitted[0]
    counts = factors.item_counts.numpy()
    first = fold_in(CONFIG, factors.items, [0, 2], [0, 4], other_counts=counts)
    both = fold_in(CONFIG, factors.items, [0, 3, 3, 5, 6], [0, -1, 4, 1, 5, -1], other_counts=counts)
    torch.testing.assert_close(both[0], first[0], atol=1e-4, rtol=0)  # 4 rows or 2 are multiplied in another order
    torch.testing.assert_close(both.norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 0.0]))


def test_bad_input_is_named(fitted):
    items = fitted[0].items
    with pytest.raises(ValueError, match="other_counts: expected 60"):
        fold_in(CONFIG, items, [0, 1], [0], other_counts=np.ones(3))
    with pytest.raises(ValueError, match="index 60 at 0, expected less than 60"):
        fold_in(CONFIG, items, [0, 1], [60], other_counts=np.ones(60))
