"""Interactions with planted groups of users and items."""

from __future__ import annotations

import numpy as np

from recpress.modules.hashing.table_stats import TableStats

USERS, ITEMS, GROUPS = 300, 200, 10


TABLES = (
    TableStats(name="users", num_ids=USERS, vocabulary="v1"),
    TableStats(name="items", num_ids=ITEMS, vocabulary="v2"),
)


def made(noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """6,000 interactions of users with items of their own of ten groups, but for a share of `noise`."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, 6000)
    items = rng.integers(0, ITEMS // GROUPS, 6000) * GROUPS + users % GROUPS
    return users, np.where(rng.random(6000) < noise, rng.integers(0, ITEMS, 6000), items)
