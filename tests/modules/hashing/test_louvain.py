"""Communities of the graph of interactions."""

from __future__ import annotations

import numpy as np

from recpress.modules.hashing.interaction_graph import InteractionGraph, louvain_class
from tests.modules.hashing.graph_cases import GROUPS, ITEMS, TABLES, USERS, made

OWN_LOUVAIN = 0.71767
"""Modularity that an implementation of our own reached on the graph of this test, before the library replaced it."""


def modularity(graph: InteractionGraph, labels: np.ndarray) -> float:
    """Barber's modularity at resolution 1, by its definition over all pairs."""
    edges = graph.biadjacency.toarray()
    same = labels[:USERS, None] == labels[None, USERS:]
    expected = np.outer(graph.user_degree, graph.item_degree) / edges.sum()
    return float(((edges - expected) * same).sum() / edges.sum())


def test_louvain_reaches_the_modularity_of_the_planted_groups() -> None:
    """With little noise, the planted groups are near the optimum at resolution 1."""
    users, items = made(noise=0.2)
    graph = InteractionGraph.of(*TABLES, users, items, 100)
    labels = graph.clusters(louvain_class("louvain"), 1.0, seed=0)
    planted = np.concatenate([np.arange(USERS) % GROUPS, np.arange(ITEMS) % GROUPS])
    assert modularity(graph, labels) >= 0.999 * modularity(graph, planted)
    assert modularity(graph, labels) >= OWN_LOUVAIN
