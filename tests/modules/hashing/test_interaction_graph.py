"""Maps of users and items by the graph of their interactions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.interaction_graph import InteractionGraph, fit_resolution
from recpress.modules.hashing.methods import JOINT_METHODS, build_map
from tests.modules.hashing.graph_cases import GROUPS, ITEMS, TABLES, USERS, made


@pytest.mark.parametrize("method", JOINT_METHODS)
def test_groups_that_do_not_interact_are_found(method: str) -> None:
    users, items = made()
    user_map, item_map = JOINT_METHODS[method](*TABLES, users, items, 2 * GROUPS, HashConfig(method=method))
    for found, number in ((user_map, USERS), (item_map, ITEMS)):
        assert found.num_rows == GROUPS
        rows = found.rows[:, 0]
        for group in range(GROUPS):
            assert len(rows[np.arange(number) % GROUPS == group].unique()) == 1
    assert (user_map.vocabulary, item_map.vocabulary, user_map.method) == ("v1", "v2", method)


@pytest.mark.parametrize("method", JOINT_METHODS)
@pytest.mark.parametrize("rows", [2, 7, 40, 120, 300])
def test_the_budget_is_for_both_tables(method: str, rows: int) -> None:
    users, items = made(noise=0.3)
    maps = JOINT_METHODS[method](*TABLES, users, items, rows, HashConfig(method=method, seed=2))
    used = sum(len(found.rows.unique()) for found in maps)
    assert used == sum(found.num_rows for found in maps) <= rows
    if rows >= 40:
        assert used > (0.8 if method == "louvain" else 0.3) * rows
    again = JOINT_METHODS[method](*TABLES, users, items, rows, HashConfig(method=method, seed=2))
    for one, other in zip(maps, again, strict=True):
        assert torch.equal(one.rows, other.rows)


@pytest.mark.parametrize("method", JOINT_METHODS)
def test_ids_without_interactions_share_one_row(method: str) -> None:
    users, items = made()
    users, items = users[users >= 50], items[users >= 50]
    maps = JOINT_METHODS[method](*TABLES, users, items, 60, HashConfig(method=method))
    rows = maps[0].rows
    assert len(rows[:50].unique()) == 1
    assert rows[0, 0] not in rows[50:]


def test_the_smallest_clusters_merge_if_no_resolution_meets_the_budget() -> None:
    users, items = made()
    graph = InteractionGraph.of(*TABLES, users, items, 4)
    groups = np.concatenate([np.arange(USERS) % GROUPS, np.arange(ITEMS) % GROUPS])
    labels, _ = fit_resolution(lambda resolution: groups, graph, 4)
    assert graph.num_rows(labels) == 4
    largest = np.bincount(np.arange(USERS) % GROUPS).argmax()
    of_largest = labels[:USERS][np.arange(USERS) % GROUPS == largest]
    assert (labels[:USERS] == of_largest[0]).sum() == len(of_largest)  # the largest cluster stays alone


@pytest.mark.parametrize("method", JOINT_METHODS)
def test_a_missing_library_is_named_with_its_extra(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sknetwork.clustering", None)
    with pytest.raises(ValueError, match=rf"method '{method}' needs scikit-network.*pip install 'recpress\[graph\]'"):
        JOINT_METHODS[method](*TABLES, *made(), 50, HashConfig(method=method))


def test_a_joint_method_is_no_method_for_one_table() -> None:
    with pytest.raises(ValueError, match="'louvain' maps two tables together; expected one of modulo"):
        build_map(TABLES[0], 10, HashConfig(method="louvain"))


@pytest.mark.parametrize("method", JOINT_METHODS)
def test_bad_input_is_refused(method: str) -> None:
    run, config = JOINT_METHODS[method], HashConfig(method=method)
    users, items = made()
    with pytest.raises(ValueError, match="6000 users and 5999 items"):
        run(*TABLES, users, items[1:], 50, config)
    with pytest.raises(ValueError, match="none, expected at least one"):
        run(*TABLES, users[:0], items[:0], 50, config)
    with pytest.raises(ValueError, match="'items': an interaction has id 200, expected 0 to 199"):
        run(*TABLES, users, items + 1, 50, config)
    with pytest.raises(ValueError, match="'users': an interaction has id -1"):
        run(*TABLES, users - 1, items, 50, config)
    for rows in (1, 501):
        with pytest.raises(ValueError, match=f"'users' and 'items': a budget of {rows} rows for both"):
            run(*TABLES, users, items, rows, config)
