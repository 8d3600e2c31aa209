"""BACO: balanced co-clusters of users and items as rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.louvain import Bipartite, Nodes, fit_resolution
from recpress.modules.hashing.problem import IdTable

SWEEPS = 5
"""Sweeps over all nodes; each joins clusters, and the balance keeps them from becoming one."""


def co_cluster(
    user: IdTable, item: IdTable, users: np.ndarray, items: np.ndarray, rows: int, config: HashConfig
) -> tuple[IdMap, IdMap]:
    """Balanced co-clustering (BACO, Jiang et al. 2026), users of a cluster on one row, its items on another.

    Clusters are to maximise  sum over pairs (u, i) of one cluster of  A_ui - resolution * w_u w_i , whose second term
    is the product of the cluster's volumes on the two sides and so balances them. Solved by label propagation as in
    the authors' code: each node starts alone; in each of `SWEEPS` sweeps in random order it takes the label among its
    neighbours' that is best for it, even where its own was better. Weights:
    w_u = d_u / sqrt(sum d_u) and w_i = d_i / sqrt(items), the scheme that the authors' code has as its default.
    Then each user gets a secondary cluster, the best of its neighbours' other than its own; its vector is the sum of
    the two rows (twice its row, where there is none other). The resolution is searched as in `louvain`, from
    `config.resolution` on; the authors give theirs for each data set, and stop the sweeps at the budget.

    Args and errors: as `louvain`.
    """
    graph = Bipartite.of(user, item, users, items, rows)
    nodes = graph.nodes(
        graph.user_degree / math.sqrt(graph.user_degree.sum()), graph.item_degree / math.sqrt(graph.num_items)
    )
    labels, resolution = fit_resolution(
        lambda resolution: _propagate(nodes, resolution, config.seed), graph, rows, config.resolution
    )
    user_map, item_map = graph.maps(labels, user, item, "co-cluster", config.seed)
    second = _secondary(nodes, graph, labels, resolution)
    names, first = np.unique(labels[: graph.num_users], return_inverse=True)
    both = np.stack([first, np.searchsorted(names, second)], 1).astype(np.int32)
    return replace(user_map, rows=torch.from_numpy(both)), item_map


def _propagate(nodes: Nodes, resolution: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = list(range(len(nodes.as_user)))
    for _ in range(SWEEPS):
        nodes.sweep(rng.permutation(len(labels)).tolist(), labels, resolution)
    return np.array(labels)


def _secondary(nodes: Nodes, graph: Bipartite, labels: np.ndarray, resolution: float) -> np.ndarray:
    """For each user, the best label of its neighbours' that some user has and that is not its own; else its own."""
    items = np.bincount(labels, nodes.as_item, int(labels.max()) + 1).tolist()
    of = labels.tolist()
    known = set(of[: graph.num_users])
    found = of[: graph.num_users]
    for user in range(graph.num_users):
        first, last = nodes.starts[user], nodes.starts[user + 1]
        edges: dict[int, float] = {}
        for other, value in zip(nodes.neighbours[first:last], nodes.values[first:last], strict=True):
            label = of[other]
            if label != of[user] and label in known:
                edges[label] = edges.get(label, 0.0) + value
        if edges:
            weight = resolution * nodes.as_user[user]
            found[user] = max((value - weight * items[label], -label) for label, value in edges.items())[1] * -1
    return np.array(found)
