"""GraphHash: communities of the graph of interactions as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.table_stats import TableStats

TRIES = 12
"""Resolutions tried to meet a budget."""
CLOSE = 0.98
"""Share of the budget that ends the search."""
SWEEPS = 10
"""Most sweeps over the nodes of one level."""


def louvain(
    user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int, config: HashConfig
) -> tuple[IdMap, IdMap]:
    """Users of one community share a row, and so do its items (GraphHash, Wu et al. 2025).

    Communities maximize the bipartite modularity (Barber 2007)
    sum over pairs (u, i) of one community of  A_ui - resolution * d_u d_i / E ,
    by the Louvain method (Blondel et al. 2008): nodes move to the best community among their neighbors', communities
    become nodes, and again, until nothing moves. The resolution is searched so that communities with users plus
    communities with items come to at most `rows`, and near to it. The search starts at rows / 40,
    where 5 % of the interactions would be inside of their communities, were those alike in size. Ids without any
    interaction share one row.

    Args:
        users, items: (E,) ids of the interactions; a pair that comes twice weighs 2.
        rows: of both tables together.

    Raises:
        ValueError: ids outside of the tables; a budget below 2 or above all ids.
    """
    graph = Bipartite.of(user, item, users, items, rows)
    half = math.sqrt(graph.edges)
    weights = (graph.user_degree / half, graph.item_degree / half)
    labels, _ = fit_resolution(
        lambda resolution: levels(graph.nodes(*weights), resolution, config.seed),
        graph,
        rows,
        rows / 40,
    )
    return graph.maps(labels, user, item, "louvain", config.seed)


@dataclass(frozen=True, eq=False)
class Nodes:
    """A graph in adjacency lists, and what each node weighs as users and as items."""

    starts: list[int]
    neighbors: list[int]
    values: list[float]
    as_user: list[float]
    as_item: list[float]

    def sweep(self, order: Sequence[int], labels: list[int], resolution: float, active: bytearray | None = None) -> int:
        """Move each node in turn to the label among its neighbors' with the highest  edges to it - resolution *
        (the node's weight as user * the label's as item + the reverse); returns how many moved; changes `labels`.

        Args:
            active: 1 for each node that is to be looked at; then a node moves only where that is better than its own
                label, and its neighbors become active when it moves. None: every node, wherever its best neighbors
                are, even where its own label was better.
        """
        users = [0.0] * len(labels)
        items = [0.0] * len(labels)
        for label, u, i in zip(labels, self.as_user, self.as_item, strict=True):
            users[label] += u
            items[label] += i
        moved = 0
        for node in order:
            if active is not None:
                if not active[node]:
                    continue
                active[node] = 0
            first, last = self.starts[node], self.starts[node + 1]
            edges: dict[int, float] = {}
            for other, value in zip(self.neighbors[first:last], self.values[first:last], strict=True):
                if other != node:
                    label = labels[other]
                    edges[label] = edges.get(label, 0.0) + value
            own = labels[node]
            as_user, as_item = self.as_user[node], self.as_item[node]
            users[own] -= as_user
            items[own] -= as_item
            u, i = resolution * as_user, resolution * as_item
            best, highest = own, -math.inf
            if active is not None:
                highest = edges.get(own, 0.0) - u * items[own] - i * users[own] + 1e-9
            for label, value in edges.items():
                score = value - u * items[label] - i * users[label]
                if score > highest:
                    best, highest = label, score
            users[best] += as_user
            items[best] += as_item
            if best != own:
                labels[node] = best
                moved += 1
                if active is not None:
                    for other in self.neighbors[first:last]:
                        if labels[other] != best:
                            active[other] = 1
        return moved

    def merged(self, labels: np.ndarray, number: int) -> Nodes:
        """The graph whose nodes are the labels 0 .. number - 1."""
        own = np.repeat(np.arange(len(self.as_user)), np.diff(self.starts))
        keys = labels[own] * number + labels[np.array(self.neighbors, np.int64)]
        pairs, inverse = np.unique(keys, return_inverse=True)
        values = np.bincount(inverse, self.values, len(pairs))
        return Nodes(
            np.searchsorted(pairs // number, np.arange(number + 1)).tolist(),
            (pairs % number).tolist(),
            values.tolist(),
            np.bincount(labels, self.as_user, number).tolist(),
            np.bincount(labels, self.as_item, number).tolist(),
        )


def levels(nodes: Nodes, resolution: float, seed: int) -> np.ndarray:
    """The Louvain method: a label for each node."""
    rng = np.random.default_rng(seed)
    found = np.arange(len(nodes.as_user))
    while True:
        number = len(nodes.as_user)
        labels = list(range(number))
        active = bytearray(b"\x01") * number
        for _ in range(SWEEPS):
            # The last few moves of a sweep are not worth another one.
            if nodes.sweep(rng.permutation(number).tolist(), labels, resolution, active) <= number // 1000:
                break
        names, renamed = np.unique(labels, return_inverse=True)
        if len(names) == number:
            return found
        found = renamed[found]
        nodes = nodes.merged(renamed, len(names))


@dataclass(frozen=True, eq=False)
class Bipartite:
    """Interactions as a graph: nodes are the users, then the items."""

    num_users: int
    num_items: int
    starts: np.ndarray
    neighbors: np.ndarray
    values: np.ndarray
    edges: float

    @classmethod
    def of(cls, user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int) -> Bipartite:
        """
        Raises:
            ValueError: see `louvain`.
        """
        if len(users) != len(items):
            raise ValueError(f"interactions: {len(users)} users and {len(items)} items, expected as many")
        if not len(users):
            raise ValueError("interactions: none, and the graph has no edge")
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
        number = user.num_ids + item.num_ids
        ends = (users.astype(np.int64), items.astype(np.int64) + user.num_ids)
        keys, values = np.unique(
            np.concatenate([ends[0] * number + ends[1], ends[1] * number + ends[0]]), return_counts=True
        )
        starts = np.searchsorted(keys // number, np.arange(number + 1))
        return cls(user.num_ids, item.num_ids, starts, keys % number, values.astype(np.float64), float(len(users)))

    @property
    def _degree(self) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    @property
    def user_degree(self) -> np.ndarray:
        """Interactions of each user."""
        return self._degree[: self.num_users]

    @property
    def item_degree(self) -> np.ndarray:
        """Interactions of each item."""
        return self._degree[self.num_users :]

    def nodes(self, user_weight: np.ndarray, item_weight: np.ndarray) -> Nodes:
        """The graph with a weight for each user and each item."""
        return Nodes(
            self.starts.tolist(),
            self.neighbors.tolist(),
            self.values.tolist(),
            [*user_weight.tolist(), *[0.0] * self.num_items],
            [*[0.0] * self.num_users, *item_weight.tolist()],
        )

    def joined(self, labels: np.ndarray) -> np.ndarray:
        """`labels` with one label for all users without interactions, and one for all such items."""
        labels = labels.copy()
        alone = np.flatnonzero(np.diff(self.starts) == 0)
        for side in (alone[alone < self.num_users], alone[alone >= self.num_users]):
            labels[side] = labels[side[:1]]
        return labels

    def count(self, labels: np.ndarray) -> int:
        """Rows that labels of all nodes need: labels that users have, and labels that items have."""
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


def fit_resolution(
    run: Callable[[float], np.ndarray], graph: Bipartite, rows: int, resolution: float
) -> tuple[np.ndarray, float]:
    """Labels by `run(resolution)` at the highest resolution found whose clusters fit into `rows`, and that resolution.

    Secants on the logarithms of resolution and clusters, within the bracket known. Where no resolution gives few
    enough (parts of the graph that no edge connects stay apart), the smallest clusters of each side are merged.
    """
    # (logarithm of the resolution, of clusters / rows, labels) on either side
    below: tuple[float, float, np.ndarray] | None = None
    above: tuple[float, float, np.ndarray] | None = None
    aim = math.log((1 + CLOSE) / 2)
    x = math.log(resolution)
    for _ in range(TRIES):
        labels = graph.joined(run(math.exp(x)))
        y = math.log(graph.count(labels) / rows)
        if y <= 0:
            below = (x, y, labels) if below is None or y >= below[1] else below
            if y >= math.log(CLOSE):
                break
        else:
            above = (x, y, labels) if above is None or y <= above[1] else above
        if below is None or above is None:
            x += 1.2 * (aim - y)  # clusters grow about as the resolution does, or more slowly
        elif above[0] - below[0] < 1e-3:
            break
        else:
            share = (aim - below[1]) / (above[1] - below[1])
            x = below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
    if below is not None:
        return below[2], math.exp(below[0])
    assert above is not None, "one of the two was set in the first turn"
    return _merge_smallest(above[2], graph, rows), math.exp(above[0])


def _merge_smallest(labels: np.ndarray, graph: Bipartite, rows: int) -> np.ndarray:
    """The smallest clusters of users and of items put together until all fit into `rows`, split by their numbers."""
    parts = [labels[: graph.num_users], labels[graph.num_users :]]
    named = [np.unique(part, return_inverse=True, return_counts=True) for part in parts]
    numbers = [len(names) for names, _, _ in named]
    keep_users = min(max(1, rows * numbers[0] // sum(numbers)), rows - 1)
    found = []
    for (_, renamed, sizes), keep in zip(named, (keep_users, rows - keep_users), strict=True):
        rank = np.empty(len(sizes), np.int64)
        rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
        # The largest half of the rows stay as they are; what comes after them is dealt out over the rest.
        safe = keep // 2
        rank = np.where(rank < safe, rank, safe + (rank - safe) % (keep - safe))
        found.append(rank[renamed])
    return np.concatenate(found)
