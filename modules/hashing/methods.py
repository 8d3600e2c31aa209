"""The table of hashing methods by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recpress.modules.config import HashConfig
from recpress.modules.hashing.cluster import cluster
from recpress.modules.hashing.co_cluster import co_cluster
from recpress.modules.hashing.double import double
from recpress.modules.hashing.frequency import frequency
from recpress.modules.hashing.hybrid import hybrid
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned import learned
from recpress.modules.hashing.louvain import louvain
from recpress.modules.hashing.modulo import modulo
from recpress.modules.hashing.problem import IdTable, Method, check_budget
from recpress.modules.hashing.quotient_remainder import quotient_remainder
from recpress.modules.hashing.universal import universal

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
"""Methods that map one table by what is known of its ids."""

JointMethod = Callable[[IdTable, IdTable, np.ndarray, np.ndarray, int, HashConfig], tuple[IdMap, IdMap]]
"""(users, items, user and item of each interaction, rows of both tables together, config) -> a map for each table."""

JOINT_METHODS: dict[str, JointMethod] = {"co-cluster": co_cluster, "louvain": louvain}
"""Methods that map users and items together, by the graph of their interactions."""


def build_map(table: IdTable, rows: int, config: HashConfig) -> IdMap:
    """The map of `table` onto at most `rows` rows by `config.method`.

    Raises:
        ValueError: no such method; a budget below 1 or above the number of ids; what the method itself refuses.
    """
    if config.method not in METHODS:
        why = " maps two tables together" if config.method in JOINT_METHODS else ""
        raise ValueError(f"hashing method {config.method!r}{why}; expected one of {', '.join(METHODS)}")
    check_budget(table, rows)
    return METHODS[config.method](table, rows, config)
