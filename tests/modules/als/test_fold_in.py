"""Fold-in: exact rows with the other side fixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.modules.als.factorization import ALS
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.fold_in import fold_in
from recpress.modules.als.half_sweep import Limits
from recpress.modules.config import ALSParameters
from tests.modules.als import als_reference as reference
from tests.ranks import run_on_ranks

USERS, ITEMS = 40, 25
CONFIG = ALSParameters(
    factors=5, sweeps=3, confidence=4.0, unobserved_weight=0.3, regularization=0.2, frequency_exponent=0.5
)


def log():
    rng = np.random.default_rng(1)
    users, items = rng.integers(0, USERS, 250), rng.integers(0, ITEMS, 250)
    pairs = np.unique(np.stack((users, items)), axis=1)
    pairs = pairs[:, pairs[0] != 4]  # user 4 has none
    return pairs[0], pairs[1], rng.integers(1, 4, pairs.shape[1]).astype(np.float32)


def csr(rows, columns, values, num_rows):
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=num_rows))))
    return indptr, columns[order], values[order]


@pytest.mark.parametrize("side", ["user", "item"])
def test_rows_of_the_fit_are_solved_exactly(side):
    """The same rows, folded in, are the reference's exact rows for these vectors of the other side."""
    users, items, values = log()
    als = ALS(replace(CONFIG, solver="cholesky"), USERS, ITEMS)
    als.add(users, items, values)
    factors = als.fit()
    matrix, seen = reference.dense(users, items, values, (USERS, ITEMS))
    if side == "user":
        found = fold_in(CONFIG, factors.items, *csr(users, items, values, USERS))
        expected = reference.half_sweep(CONFIG, factors.items.double().numpy(), matrix, seen)
        assert not found[4].any()
    else:
        gramian = factors.users.T @ factors.users
        found = fold_in(CONFIG, factors.users, *csr(items, users, values, ITEMS), gramian=gramian)
        expected = reference.half_sweep(CONFIG, factors.users.double().numpy(), matrix.T, seen.T)
        # the fit solved the items last, from these very users
        torch.testing.assert_close(found, factors.items, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_unknown_ids_are_left_out():
    others = torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(0))
    with_unknown = fold_in(CONFIG, others, np.array([0, 3, 5, 5]), np.array([2, -1, 7, -1, -1]))
    known = fold_in(CONFIG, others, np.array([0, 2]), np.array([2, 7]))
    assert torch.equal(with_unknown[0], known[0])
    assert not with_unknown[1:].any()
    assert fold_in(CONFIG, others, np.array([0]), np.empty(0, np.int32)).shape == (0, 5)


@pytest.mark.parametrize(
    ("indptr", "indices", "values", "message"),
    [
        ([0, 2], [0, ITEMS], None, "index 25 at 1, expected less than 25"),
        ([0, 3], [0, 1], None, "indptr: expected 0 to 2"),
        ([0, 2], [0, 1], [1.0, float("nan")], "nan found"),
        ([0, 2], [0, 1], [1.0], "number differs"),
    ],
)
def test_bad_rows_are_refused(indptr, indices, values, message):
    with pytest.raises(ValueError, match=message):
        fold_in(CONFIG, torch.ones(ITEMS, 5), np.array(indptr), np.array(indices), values)


def on_rank(others, table):
    """Rank 0 folds in three quarters of the users, from its block of the items."""
    rank, world = dist.get_rank(), dist.get_world_size()
    indptr, indices, values = csr(*log(), USERS)
    first, last = ((0, 30), (30, 40))[rank]
    cut = slice(indptr[first], indptr[last])
    blocks = RowBlocks(ITEMS, world)
    shard = others[blocks.start(rank) : blocks.stop(rank)]
    part = (indptr[first : last + 1] - indptr[first], indices[cut], values[cut])
    return fold_in(CONFIG, shard, *part, num_others=ITEMS, sharded=True, limits=Limits(20, 4, 6, table))


@pytest.mark.parametrize("table", [None, 0], ids=["gathered", "fetched"])
def test_sharded_items(table):
    others = torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(0))
    whole = fold_in(CONFIG, others, *csr(*log(), USERS))
    torch.testing.assert_close(torch.cat(run_on_ranks(on_rank, 2, others, table)), whole, rtol=0, atol=1e-5)
