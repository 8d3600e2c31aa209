"""Logistic factorization: its loss against a plain loop, and the folding of the biases."""

import math

import pytest
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.config import LogisticConfig
from recpress.modules.two_tower.logistic import LogisticMF
from recpress.modules.two_tower.model import SideSpec

USERS, ITEMS, ROWS, NEGATIVES = 6, 5, 4, 2


def keyed(key, ids):
    return KeyedJaggedTensor([key], ids, lengths=torch.ones_like(ids, dtype=torch.int32))


class Rows:
    """What a batch is to the model."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.users = torch.randint(USERS, (ROWS,), generator=generator)
        self.items = torch.randint(ITEMS, (ROWS * (1 + NEGATIVES),), generator=generator)
        self.user_features, self.item_features = keyed("user", self.users), keyed("item", self.items)
        self.label = torch.tensor([1.0, 0.5, 1.0, 0.0])


@pytest.fixture
def model():
    torch.manual_seed(3)
    made = LogisticMF(
        LogisticConfig(factors=3, weight_decay=0.2),
        SideSpec(key="user", rows=USERS),
        SideSpec(key="item", rows=ITEMS),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def parts(collection):
    weight = next(iter(collection.parameters()))
    return weight[:, :3].detach(), weight[:, 3].detach()


def logit(model, user, item):
    (u, b_u), (v, b_v) = parts(model.user_tables), parts(model.item_tables)
    return float(u[user] @ v[item] + b_u[user] + b_v[item] + model.head.bias.detach())


def test_folded_vectors_give_the_logit(model):
    users = model.user_vectors(keyed("user", torch.arange(USERS)))
    items = model.item_vectors(keyed("item", torch.arange(ITEMS)))
    assert users.shape == (USERS, 5)
    want = [[logit(model, user, item) for item in range(ITEMS)] for user in range(USERS)]
    torch.testing.assert_close(users @ items.T, torch.tensor(want))


def test_the_loss_is_the_cross_entropy_of_all_pairs_and_l2(model):
    batch = Rows()
    total = 0.0
    for row in range(ROWS):
        places = [row, *range(ROWS + row * NEGATIVES, ROWS + (row + 1) * NEGATIVES)]
        for place in places:
            p = 1 / (1 + math.exp(-logit(model, batch.users[row], batch.items[place])))
            target = float(batch.label[row]) if place == row else 0.0
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    entropy = total / (ROWS * (1 + NEGATIVES))
    (u, _), (v, _) = parts(model.user_tables), parts(model.item_tables)
    squares = u[batch.users].square().sum(1).mean() + v[batch.items].square().sum(1).mean()
    loss, shown = model(batch)
    assert shown.item() == pytest.approx(entropy, rel=1e-5)
    assert loss.item() == pytest.approx(entropy + 0.5 * 0.2 * float(squares), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
