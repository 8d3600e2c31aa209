"""GraphHash: communities of the graph of interactions as rows."""

from __future__ import annotations

import numpy as np

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.interaction_graph import InteractionGraph, fit_resolution, louvain_class
from recpress.modules.hashing.table_stats import TableStats


def louvain(
    user: TableStats, item: TableStats, users: np.ndarray, items: np.ndarray, rows: int, config: HashConfig
) -> tuple[IdMap, IdMap]:
    """Users of a community share a row, and so do its items (GraphHash, Wu et al. 2025).

    Communities maximize the bipartite modularity (Barber 2007)
    sum over pairs (u, i) of one community of  A_ui - resolution * d_u d_i / E
    by the Louvain method (Blondel et al. 2008) of scikit-network. The resolution is chosen such that communities with
    users plus communities with items use nearly all of `rows`. Ids without interactions share one row per table.

    Args:
        users, items: (E,) ids of the interactions. A repeated pair counts each time.
        rows: budget of both tables together.

    Raises:
        ValueError: scikit-network is not installed; see `InteractionGraph.of` for the rest.
    """
    method = louvain_class("louvain")
    graph = InteractionGraph.of(user, item, users, items, rows)

    labels, _ = fit_resolution(lambda resolution: graph.clusters(method, resolution, config.seed), graph, rows)
    return graph.maps(labels, user, item, "louvain", config.seed)
