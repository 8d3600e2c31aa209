"""The bipartite graph of interactions, and clusters of its users and items that fit a budget of rows.

Needs the extra `graph` (scikit-network).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.table_stats import TableStats

TRIES = 12
"""Resolutions to try for a budget."""
CLOSE = 0.98
"""Share of the budget that ends the search."""
TOLERANCE = 1e-5
"""Least increase in modularity for another pass of the Louvain method."""


def louvain_class(method: str) -> Any:
    """scikit-network's Louvain method. Raises ValueError that names the extra if it is not installed."""
    try:
        from sknetwork.clustering import Louvain
    except ImportError as error:
        raise ValueError(
            f"method {method!r} needs scikit-network, which is not installed ({error}); install the extra: "
            "pip install 'recpress[graph]'"
        ) from error
    return Louvain


@dataclass(frozen=True, eq=False)
class InteractionGraph:
    """Users and items as nodes. An edge weighs as much as its interactions."""

    biadjacency: Any
    """scipy CSR matrix (num_users, num_items) float64."""

    @classmethod
    def of(
        cls, user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int
    ) -> InteractionGraph:
        """
        Args:
            users, items: (E,) ids of the interactions.
            rows: budget of both tables together.

        Raises:
            ValueError: there are no interactions; an id is outside its table; the budget is below 2 or above all ids.
        """
        if len(users) != len(items):
            raise ValueError(f"interactions: {len(users)} users and {len(items)} items, expected equal numbers")
        if not len(users):
            raise ValueError("interactions: none, expected at least one edge of the graph")
        for table, ids in ((user, users), (item, items)):
            if int(ids.min()) < 0 or int(ids.max()) >= table.num_ids:
                bad = int(ids[(ids < 0) | (ids >= table.num_ids)][0])
                raise ValueError(
                    f"table {table.name!r}: an interaction has id {bad}, expected 0 to {table.num_ids - 1}"
                )
        if not 2 <= rows <= user.num_ids + item.num_ids:
            raise ValueError(
                f"tables {user.name!r} and {item.name!r}: a budget of {rows} rows for both, expected 2 to "
                f"{user.num_ids + item.num_ids}, their ids"
            )
        from scipy import sparse

        shape = (user.num_ids, item.num_ids)
        return cls(sparse.csr_matrix((np.ones(len(users)), (users, items)), shape))

    @property
    def num_users(self) -> int:
        return self.biadjacency.shape[0]

    @property
    def user_degree(self) -> np.ndarray:
        """Interactions of each user, (num_users,)."""
        return np.asarray(self.biadjacency.sum(1)).ravel()

    @property
    def item_degree(self) -> np.ndarray:
        """Interactions of each item, (num_items,)."""
        return np.asarray(self.biadjacency.sum(0)).ravel()

    def clusters(self, method: Any, resolution: float, seed: int) -> np.ndarray:
        """Labels (num_users + num_items,) by a Louvain class. Isolated users share one label, and so do such items."""
        louvain = method(
            resolution,
            tol_optimization=TOLERANCE,
            tol_aggregation=TOLERANCE,
            shuffle_nodes=True,
            return_probs=False,
            return_aggregate=False,
            random_state=seed % 2**32,
        )
        louvain.fit(self.biadjacency, force_bipartite=True)
        labels = np.concatenate([louvain.labels_row_, louvain.labels_col_])
        alone = np.flatnonzero(np.concatenate([self.user_degree, self.item_degree]) == 0)
        for ids in (alone[alone < self.num_users], alone[alone >= self.num_users]):
            labels[ids] = labels[ids[:1]]
        return labels

    def num_rows(self, labels: np.ndarray) -> int:
        """Rows that labels of all nodes need: labels of users plus labels of items."""
        return len(np.unique(labels[: self.num_users])) + len(np.unique(labels[self.num_users :]))

    def maps(
        self, labels: np.ndarray, user: TableStats, item: TableStats, method: str, seed: int
    ) -> tuple[IdMap, IdMap]:
        """Labels of all nodes as one map for each table."""
        found = []
        for table, part in ((user, labels[: self.num_users]), (item, labels[self.num_users :])):
            names, rows = np.unique(part, return_inverse=True)
            found.append(
                IdMap(
                    rows=torch.from_numpy(rows.astype(np.int32))[:, None],
                    num_rows=len(names),
                    method=method,
                    vocabulary=table.vocabulary,
                    seed=seed,
                )
            )
        return found[0], found[1]


def fit_resolution(run: Callable[[float], np.ndarray], graph: InteractionGraph, rows: int) -> tuple[np.ndarray, float]:
    """Labels by `run(resolution)` for the highest resolution found whose clusters fit in `rows`, and that resolution.

    Secant steps on the logarithms of resolution and clusters, within the known bracket. They start at rows / 40, where
    clusters of equal size would contain 5 % of the interactions. If no resolution gives few enough clusters (components
    of the graph never merge), the smallest clusters of users and of items are merged.
    """
    # (log of the resolution, log of clusters / rows, labels) on both sides of the budget
    below: tuple[float, float, np.ndarray] | None = None
    above: tuple[float, float, np.ndarray] | None = None
    aim = math.log((1 + CLOSE) / 2)
    x = math.log(rows / 40)
    for _ in range(TRIES):
        labels = run(math.exp(x))
        y = math.log(graph.num_rows(labels) / rows)
        if y <= 0:
            below = (x, y, labels) if below is None or y >= below[1] else below
            if y >= math.log(CLOSE):
                break
        else:
            above = (x, y, labels) if above is None or y <= above[1] else above
        if below is None or above is None:
            x += 1.2 * (aim - y)  # clusters grow about as fast as the resolution, or slower
        elif above[0] - below[0] < 1e-3:
            break
        else:
            share = (aim - below[1]) / (above[1] - below[1])
            x = below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
    if below is not None:
        return below[2], math.exp(below[0])
    assert above is not None, "the first try sets one of the two"
    return _merge_smallest(above[2], graph, rows), math.exp(above[0])


def _merge_smallest(labels: np.ndarray, graph: InteractionGraph, rows: int) -> np.ndarray:
    """Merge the smallest clusters of users and of items until all fit in `rows`, split by their numbers."""
    parts = [labels[: graph.num_users], labels[graph.num_users :]]
    named = [np.unique(part, return_inverse=True, return_counts=True) for part in parts]
    numbers = [len(names) for names, _, _ in named]
    user_rows = min(max(1, rows * numbers[0] // sum(numbers)), rows - 1)
    found = []
    for (_, renamed, sizes), limit in zip(named, (user_rows, rows - user_rows), strict=True):
        rank = np.empty(len(sizes), np.int64)
        rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
        # The largest clusters get half of the rows unchanged; the others are spread evenly over the rest.
        safe = limit // 2
        rank = np.where(rank < safe, rank, safe + (rank - safe) % (limit - safe))
        found.append(rank[renamed])
    return np.concatenate(found)
