"""A map by the embedding alone."""

from __future__ import annotations

from recpress.modules.config import HashConfig
from recpress.modules.hashing.clustering import cluster as k_means
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.problem import IdTable, need_embedding


def cluster(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """Row of an id: its cluster by k-means on the embedding, every id of weight 1 (`clustering.cluster`)."""
    embedding = need_embedding(table, "cluster")
    found = k_means(
        embedding,
        None,
        rows,
        seed=config.seed,
        iterations=config.iterations,
        name=table.name,
        progress=table.progress,
    )
    return IdMap(
        rows=found.assignment[:, None],
        num_rows=rows,
        method="cluster",
        vocabulary=table.vocabulary,
        seed=config.seed,
    )
