"""Towers start with the scores of the factorization, and take further features."""

import numpy as np
import pytest
import torch

from recpress.modules.config import TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower
from tests.modules.two_tower.model_cases import DIM, ITEMS, USERS, build, factors, keyed, scores


@pytest.mark.parametrize("strategy", ["warm-start", "frozen", "frozen+residual"])
@pytest.mark.parametrize("counted", [False, True])
def test_residual_towers_start_with_the_scores_of_the_factorization(strategy, counted):
    user, item = factors()
    model = build(strategy, counted=counted)
    if counted:
        model.load_counts(np.ones((USERS, 1), np.float32), np.zeros((ITEMS, 1), np.float32))
    torch.testing.assert_close(scores(model), torch.from_numpy(user @ item.T))


def test_residual_towers_of_one_id_are_finite():
    """The lengths of a table of one row do not vary."""
    torch.manual_seed(0)
    config = TwoTowerConfig(tables=TablesConfig(strategy="frozen"), towers=TowersConfig(kind="residual", hidden=(10,)))
    model = TwoTower(config, SideSpec(key="user", rows=1, dim=DIM), SideSpec(key="item", rows=ITEMS, dim=DIM))
    user, item = factors()[0][:1], factors()[1]
    model.load_factors(user, item)
    found = model.user_vectors(keyed(user=[0])) @ model.item_vectors(keyed(item=range(ITEMS))).T
    torch.testing.assert_close(found, torch.from_numpy(user @ item.T))


def test_mlp_towers_do_not():
    user, item = factors()
    assert not torch.allclose(scores(build(kind="mlp")), torch.from_numpy(user @ item.T), atol=0.1)


def test_further_features_join_the_tower():
    model = build("frozen", "mlp", categorical={"genre": 4}, floats=2)
    users = torch.arange(3)
    features = keyed(user=users, genre=[0, 1, 2])
    first = model.user_vectors(features, torch.zeros(3, 2))
    other_genre = model.user_vectors(keyed(user=users, genre=[3, 1, 2]), torch.zeros(3, 2))
    other_float = model.user_vectors(features, torch.tensor([[0.0, 0], [0, 1], [0, 0]]))
    assert (first != other_genre).any(1).tolist() == [True, False, False]
    assert (first != other_float).any(1).tolist() == [False, True, False]
