"""BACO: balanced co-clusters of users and items as rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.interaction_graph import InteractionGraph, fit_resolution, louvain_class
from recpress.modules.hashing.table_stats import TableStats


def co_cluster(
    user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int, config: HashConfig
) -> tuple[IdMap, IdMap]:
    """Balanced co-clusters (BACO, Jiang et al. 2026): users of a cluster share a row, and its items another.

    Clusters maximize  sum over pairs (u, i) of one cluster of  A_ui / E - resolution * w_u w_i . The second term, the
    product of the cluster's volumes on both sides, balances the clusters. The weights are powers of the degree,
    w = d ** config.count_exponent, with sum 1: an exponent of 0 balances the number of ids; 1 gives the modularity of
    `louvain`. Each user also gets a secondary cluster, the best of its neighbors' other clusters. Its vector is the sum
    of the two rows, or twice its row if there is no other cluster.

    This differs from the authors' code in three points. They propagate labels in one level, with a resolution tuned for
    each data set, and stop at the budget or after five passes: on Beauty with 43 % of the users and 38 % of the items
    in one cluster each. Here the Louvain method solves the same objective level by level, and the resolution is chosen
    for the budget. They train the rows with LightGCN, whose propagation tells the ids of a cluster apart by their
    neighbors. Without it, ids with the same rows tie, which costs graph clusters more than clusters of factors
    (benchmarks/propagation.py). They take the mean of a user's two rows, which is the sum at another scale.

    Args and errors: as in `louvain.louvain`.
    """
    method = louvain_class("co-cluster")
    graph = InteractionGraph.of(user, item, users, items, rows)
    user_weight = _weights(graph.user_degree, config.count_exponent)
    item_weight = _weights(graph.item_degree, config.count_exponent)
    out_weight = np.concatenate([user_weight, np.zeros_like(item_weight)])
    in_weight = np.concatenate([np.zeros_like(user_weight), item_weight])

    class Balanced(method):  # type: ignore[misc, valid-type]
        """The library's method, with these weights in place of the degrees. It has no public option for weights."""

        def _pre_processing(self, *args: Any) -> Any:
            adjacency, _, _, membership, index = super()._pre_processing(*args)
            return adjacency, out_weight[index], in_weight[index], membership, index

    labels, resolution = fit_resolution(lambda value: graph.clusters(Balanced, value, config.seed), graph, rows)
    user_map, item_map = graph.maps(labels, user, item, "co-cluster", config.seed)
    second = _secondary(graph, labels, resolution * user_weight, item_weight)
    names, first = np.unique(labels[: graph.num_users], return_inverse=True)
    both = np.stack([first, np.searchsorted(names, second)], 1).astype(np.int32)
    return replace(user_map, rows=torch.from_numpy(both)), item_map


def _weights(degree: np.ndarray, exponent: float) -> np.ndarray:
    """Powers of the degrees, with sum 1. An id without interactions has weight 0."""
    weights = np.where(degree > 0, np.maximum(degree, 1.0) ** exponent, 0.0)
    return weights / weights.sum()


def _secondary(
    graph: InteractionGraph, labels: np.ndarray, user_weight: np.ndarray, item_weight: np.ndarray
) -> np.ndarray:
    """For each user, the best label of its items that other users have; its own label if there is none.

    user_weight: already multiplied by the resolution.
    """
    from scipy import sparse

    own, of_item = labels[: graph.num_users], labels[graph.num_users :]
    number = int(labels.max()) + 1
    volume = np.bincount(of_item, item_weight, number)
    membership = sparse.csr_matrix((np.ones(len(of_item)), (np.arange(len(of_item)), of_item)), (len(of_item), number))
    edges = (graph.biadjacency @ membership).tocoo()  # of each user to each label
    wanted = np.isin(edges.col, own) & (edges.col != own[edges.row])
    user, label = edges.row[wanted], edges.col[wanted]
    score = edges.data[wanted] / graph.biadjacency.sum() - user_weight[user] * volume[label]
    order = np.lexsort((label, -score, user))  # by user, best first, the lower label wins a tie
    users, first = np.unique(user[order], return_index=True)
    second = own.copy()
    second[users] = label[order][first]
    return second
