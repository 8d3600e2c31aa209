"""A small log and settings for the tests of the factorization."""

from __future__ import annotations

import numpy as np

from recpress.modules.als.factorization import ALS
from recpress.modules.config import ALSParameters

USERS, ITEMS = 53, 31


CONFIGS = {
    "hu": ALSParameters(factors=6, sweeps=4, confidence=5.0, regularization=2.0),
    "rendle": ALSParameters(
        factors=6,
        sweeps=4,
        confidence=1.0,
        unobserved_weight=0.1,
        regularization=0.05,
        frequency_exponent=1.0,
    ),
    "half": ALSParameters(
        factors=6, sweeps=4, confidence=3.0, unobserved_weight=0.5, regularization=0.2, frequency_exponent=0.5
    ),
}


def log(valued: bool = False, seed: int = 0, rows: int = 400):
    """Skewed ids, with duplicates, empty users and empty items."""
    rng = np.random.default_rng(seed)
    users = (USERS * rng.random(rows) ** 2).astype(np.int64)
    items = (ITEMS * rng.random(rows) ** 2).astype(np.int64)
    users[users == 7] = 8
    items[items == 5] = 6
    return users, items, rng.integers(0, 5, rows).astype(np.float32) if valued else None


def run(config: ALSParameters, triples, limits=None, start=None, chunks: int = 1, on_sweep=None):
    als = ALS(config, USERS, ITEMS, limits=limits)
    for part in np.array_split(np.arange(len(triples[0])), chunks):
        als.add(*(None if column is None else column[part] for column in triples))
    objectives: list[float] = []

    def record(report):
        objectives.append(report.objective)
        return on_sweep is not None and on_sweep(report)

    return als.fit(record, start), objectives
