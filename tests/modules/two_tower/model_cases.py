"""Small two-tower models and batches."""

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower

USERS, ITEMS, DIM = 9, 7, 6  # a dimension that is padded to 8


def factors():
    rng = np.random.default_rng(2)
    return tuple(rng.normal(0, 0.4, (n, DIM)).astype(np.float32) for n in (USERS, ITEMS))


def build(strategy="frozen", kind="residual", counted=False, storage="fp32", **side):
    torch.manual_seed(0)
    config = TwoTowerConfig(
        tables=TablesConfig(strategy=strategy, storage=storage, dim=8, residual_dim=4),
        towers=TowersConfig(kind=kind, hidden=(10,), dim=5, feature_dim=4),
        loss=LossConfig(),
    )
    model = TwoTower(
        config,
        SideSpec(key="user", rows=USERS, dim=DIM, counted=counted, **side),
        SideSpec(key="item", rows=ITEMS, dim=DIM, counted=counted),
    )
    if strategy != "random":
        model.load_factors(*factors())
    return model


def keyed(**ids):
    lengths = torch.ones(sum(len(v) for v in ids.values()), dtype=torch.int32)
    return KeyedJaggedTensor(list(ids), torch.cat([torch.as_tensor(v) for v in ids.values()]), lengths=lengths)


def scores(model, **floats):
    users = model.user_vectors(keyed(user=range(USERS)), **floats)
    return users @ model.item_vectors(keyed(item=range(ITEMS))).T
