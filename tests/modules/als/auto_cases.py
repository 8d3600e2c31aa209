"""Logs with and without planted preferences, and their factorization."""

from __future__ import annotations

import numpy as np

from recpress.modules.als.factorization import ALS

USERS, ITEMS, TASTES = 600, 240, 6


def planted(rows: int = 9000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Users who take four interactions in five from their own taste."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, rows)
    own = rng.random(rows) < 0.8
    taste = np.where(own, users % TASTES, rng.integers(0, TASTES, rows))
    return users, taste + TASTES * (ITEMS // TASTES * rng.random(rows) ** 2).astype(np.int64)


def fit(config, users, items, values=None, shape=(USERS, ITEMS)):
    als = ALS(config, *shape)
    als.add(users, items, values)
    return als, als.fit()
