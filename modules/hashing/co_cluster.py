"""BACO: balanced co-clusters of users and items as rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.louvain import Bipartite, Nodes, fit_resolution, levels
from recpress.modules.hashing.table_stats import TableStats


def co_cluster(
    user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int, config: HashConfig
) -> tuple[IdMap, IdMap]:
    """Balanced co-clustering (BACO, Jiang et al. 2026), users of a cluster on one row, its items on another.

    Clusters are to maximize  sum over pairs (u, i) of one cluster of  A_ui - resolution * w_u w_i , whose second term
    is the product of the cluster's volumes on the two sides and so balances them. The weights are powers of the degree,
    w = d ** config.count_exponent: 0 balances the numbers of ids, 1 is the modularity of `louvain`. Then each user gets
    a secondary cluster, the best of its neighbors' other than its own; its vector is the sum of the two rows (twice its
    row, where there is none other).

    Two departures from the authors' code, for what it gave here: they propagate labels in one level, with a resolution
    of their own for each data set, and stop at the budget; that ended with one cluster of half of the ids, or with
    twice the budget. Here the same objective is solved level by level (Blondel et al. 2008), and the resolution is
    searched so that clusters come near to the budget, both as in `louvain`.

    Args and errors: as `louvain`.
    """
    graph = Bipartite.of(user, item, users, items, rows)
    nodes = graph.nodes(*(_weights(degree, config.count_exponent) for degree in (graph.user_degree, graph.item_degree)))
    labels, resolution = fit_resolution(lambda at: levels(nodes, at, config.seed), graph, rows, 0.1)
    user_map, item_map = graph.maps(labels, user, item, "co-cluster", config.seed)
    second = _secondary(nodes, graph, labels, resolution)
    names, first = np.unique(labels[: graph.num_users], return_inverse=True)
    both = np.stack([first, np.searchsorted(names, second)], 1).astype(np.int32)
    return replace(user_map, rows=torch.from_numpy(both)), item_map


def _weights(degree: np.ndarray, power: float) -> np.ndarray:
    """Powers of the degrees, of mean 1; an id without interactions weighs nothing."""
    weights = np.where(degree > 0, np.maximum(degree, 1.0) ** power, 0.0)
    return weights / max(weights.mean(), 1e-30)


def _secondary(nodes: Nodes, graph: Bipartite, labels: np.ndarray, resolution: float) -> np.ndarray:
    """For each user, the best label of its neighbors' that some user has and that is not its own; else its own."""
    items = np.bincount(labels, nodes.as_item, int(labels.max()) + 1).tolist()
    of = labels.tolist()
    known = set(of[: graph.num_users])
    found = of[: graph.num_users]
    for user in range(graph.num_users):
        first, last = nodes.starts[user], nodes.starts[user + 1]
        edges: dict[int, float] = {}
        for other, value in zip(nodes.neighbors[first:last], nodes.values[first:last], strict=True):
            label = of[other]
            if label != of[user] and label in known:
                edges[label] = edges.get(label, 0.0) + value
        if edges:
            weight = resolution * nodes.as_user[user]
            found[user] = max((value - weight * items[label], -label) for label, value in edges.items())[1] * -1
    return np.array(found)
