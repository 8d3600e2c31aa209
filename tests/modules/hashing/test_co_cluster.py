"""Balanced co-clusters with a second row per user."""

from __future__ import annotations

import numpy as np

from recpress.modules.config import HashConfig
from recpress.modules.hashing.methods import JOINT_METHODS
from tests.modules.hashing.graph_cases import GROUPS, ITEMS, TABLES, made


def test_a_co_cluster_gives_users_a_second_row_that_is_not_their_own() -> None:
    """A user who is between two groups has the row of each."""
    users, items = made()
    bridge = np.arange(0, ITEMS, GROUPS)
    users = np.concatenate([users, np.full(10, 1), np.full(20, 1)])
    items = np.concatenate([items, bridge[:10], np.resize(np.arange(1, ITEMS, GROUPS), 20)])
    user_map, item_map = JOINT_METHODS["co-cluster"](*TABLES, users, items, 2 * GROUPS, HashConfig())
    assert user_map.rows_per_id == 2
    assert item_map.rows_per_id == 1
    first, second = user_map.rows.T
    assert second[1] == first[10]  # user 10 is of the group of the bridge's items
    assert int((first != second).sum()) < 10
