"""The table of hashing methods by name. A new method is a function here and a name in `config.HashMethod`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recpress.modules.config import HashConfig
from recpress.modules.hashing.co_cluster import co_cluster
from recpress.modules.hashing.formulas import double, modulo, quotient_remainder, universal
from recpress.modules.hashing.frequency import frequency, hybrid
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned import cluster, learned
from recpress.modules.hashing.louvain import louvain
from recpress.modules.hashing.table_stats import TableStats, check_budget

Method = Callable[[TableStats, int, HashConfig], IdMap]
"""(table, rows, config) -> map onto at most `rows` rows, a pure function of its arguments.

Raises a ValueError that names the table if it lacks the counts or the embedding that the method needs, if a row of the
embedding is not finite, or if the method cannot use the budget.
"""

METHODS: dict[str, Method] = {
    "modulo": modulo,
    "universal": universal,
    "double": double,
    "frequency": frequency,
    "hybrid": hybrid,
    "quotient-remainder": quotient_remainder,
    "cluster": cluster,
    "learned": learned,
}
"""Methods that map the ids of one table."""

FROM_EMBEDDING = ("cluster", "learned")
"""Methods that need an embedding of the ids."""

JointMethod = Callable[[TableStats, TableStats, np.ndarray, np.ndarray, int, HashConfig], tuple[IdMap, IdMap]]
"""(users, items, user and item of each interaction, rows of both tables together, config) -> a map for each table."""

JOINT_METHODS: dict[str, JointMethod] = {"co-cluster": co_cluster, "louvain": louvain}
"""Methods that map users and items together, from the graph of their interactions."""


def build_map(table: TableStats, rows: int, config: HashConfig) -> IdMap:
    """Map the ids of `table` onto at most `rows` rows by `config.method`.

    Raises:
        ValueError: an unknown method; a budget below 1 or above the number of ids; see `Method` for the rest.

    Example:
        >>> table = TableStats(name="items", num_ids=6, counts=torch.tensor([9, 0, 3, 0, 0, 1]))
        >>> build_map(table, 3, HashConfig(method="frequency")).rows[:, 0].tolist()
        [0, 2, 1, 2, 1, 2]
    """
    if config.method not in METHODS:
        why = " maps two tables together" if config.method in JOINT_METHODS else ""
        raise ValueError(f"hashing method {config.method!r}{why}; expected one of {', '.join(METHODS)}")
    check_budget(table, rows)
    return METHODS[config.method](table, rows, config)
