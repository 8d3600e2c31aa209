"""Contrastive factorization with shared rows: with a row per id as without maps, with fewer rows still in groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import Contrastive, Run
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_contrastive import MappedRows, fit_shared

USERS, ITEMS, GROUPS = 60, 40, 4
CONFIG = ContrastiveConfig(factors=8, epochs=10, batch_users=16, negatives=32)


def interactions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, 1500)
    return users, rng.integers(0, ITEMS // GROUPS, 1500) * GROUPS + users % GROUPS


def csrs():
    builder = InteractionBuilder(USERS, ITEMS, Exchange(None, torch.device("cpu")))
    builder.add(*interactions())
    return builder.build()


def full():
    model = Contrastive(CONFIG, USERS, ITEMS)
    model.add(*interactions())
    return model.fit()


def identity(count: int) -> IdMap:
    return IdMap(rows=torch.arange(count, dtype=torch.int32)[:, None], num_rows=count)


def within_groups(count: int, weighted: bool) -> IdMap:
    """Two rows per group; with weights, each id is a sum of them."""
    group = torch.arange(count) % GROUPS
    if not weighted:
        return IdMap(rows=(2 * group + torch.arange(count) // GROUPS % 2).int()[:, None], num_rows=2 * GROUPS)
    weights = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    return IdMap(rows=torch.stack([2 * group, 2 * group + 1], 1).int(), num_rows=2 * GROUPS, weights=weights.half())


def test_a_row_per_id_trains_as_without_maps() -> None:
    start = full()
    mapped = tuple(MappedRows(vectors.clone(), identity(len(vectors))) for vectors in (start.users, start.items))
    plain = Run(CONFIG, *csrs(), USERS, ITEMS, Exchange(None, torch.device("cpu")), start)
    for table, adam in zip(mapped, (plain.users, plain.items.adam), strict=True):
        table.rows.copy_(adam.rows)
    shared = Run(CONFIG, *csrs(), USERS, ITEMS, Exchange(None, torch.device("cpu")), tables=mapped)
    for run in (plain, shared):
        run.train()
    torch.testing.assert_close(shared.factors().users, plain.factors().users, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.factors().items, plain.factors().items, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_training_improves_the_rows_that_fit_best(weighted: bool) -> None:
    start, pair = full(), csrs()
    maps = within_groups(USERS, weighted), within_groups(ITEMS, weighted)
    own = np.arange(USERS)[:, None] % GROUPS == np.arange(ITEMS) % GROUPS
    gaps = []
    for epochs in (0, 20):
        found = fit_shared(CONFIG, *pair, *maps, start.users, start.items, epochs=epochs)
        torch.testing.assert_close(found.users.norm(dim=1), torch.ones(USERS), rtol=2e-3, atol=2e-3)
        lengths = torch.from_numpy(np.diff(pair[1].indptr)).clamp(min=1) ** 0.05
        if not weighted:  # a row has the mean of its ids
            row = maps[1].rows[:, 0].long()
            lengths = torch.stack([lengths[row == k].mean() for k in row])
        torch.testing.assert_close(found.items.norm(dim=1), lengths, rtol=2e-3, atol=2e-3)
        scores = (found.users @ found.items.T).numpy()
        gaps.append(scores[own].mean() - scores[~own].mean())
    assert gaps[0] > 0.5
    assert gaps[1] > gaps[0]


def test_the_rows_of_the_caller_do_not_change() -> None:
    start, pair = full(), csrs()
    before = start.users.clone()
    fit_shared(replace(CONFIG, seed=1), *pair, identity(USERS), identity(ITEMS), start.users, start.items, epochs=2)
    assert torch.equal(start.users, before)
