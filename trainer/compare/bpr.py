"""Bayesian personalized ranking by the library `implicit`: a peer that is no network, for logs of up to a few million
rows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recpress.data.dataset.log import Log
from recpress.data.sampling.scan import iter_columns

INSTALL = "pip install implicit, or scripts/install.sh .venv bench"
MAX_ROWS = 2_000_000
TRIALS: tuple[dict[str, float], ...] = (
    {"learning_rate": 0.01, "regularization": 0.01},
    {"learning_rate": 0.05, "regularization": 0.01},
    {"learning_rate": 0.05, "regularization": 0.05},
)
"""The first are the library's own defaults."""


@dataclass(frozen=True)
class BPRPoint:
    """Vectors after some iterations."""

    iterations: int
    seconds: float
    """Reading the log and fitting so far."""
    users: np.ndarray
    """(users, factors + 1) float32; the last column meets the items' bias."""
    items: np.ndarray
    """(items, factors + 1) float32."""


def installed() -> bool:
    """Whether `implicit` and what it needs can be imported."""
    try:
        import implicit.cpu.bpr  # noqa: F401
        import scipy.sparse  # noqa: F401
    except ImportError:
        return False
    return True


def fit_bpr(
    log: Log, settings: dict[str, float], *, factors: int, iterations: int, every: int = 0, seed: int = 0
) -> list[BPRPoint]:
    """Fit the train rows of a log, on this rank alone.

    Args:
        every: iterations between two points; 0: the last one only.
    """
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    begin = time.monotonic()
    schema = log.schema
    columns = [(data[schema.user], data[schema.item]) for data in iter_columns(log.train, [schema.user, schema.item])]
    users, items = (np.concatenate([np.asarray(pair[side]) for pair in columns]) for side in (0, 1))
    ones = np.ones(len(users), np.float32)
    matrix = csr_matrix((ones, (users, items)), shape=(log.num_users, log.num_items))
    points: list[BPRPoint] = []
    copying = 0.0

    def take(iteration: int, *_: Any) -> None:
        nonlocal copying
        now = time.monotonic()
        done = iteration + 1
        if done == iterations or (every and done % every == 0):
            vectors = (np.array(side, np.float32) for side in (model.user_factors, model.item_factors))
            points.append(BPRPoint(done, now - begin - copying, *vectors))
        copying += time.monotonic() - now

    model = BayesianPersonalizedRanking(
        factors=factors,
        iterations=iterations,
        num_threads=torch.get_num_threads(),
        random_state=seed,
        learning_rate=settings["learning_rate"],
        regularization=settings["regularization"],
    )
    model.fit(matrix, show_progress=False, callback=take)
    return points
