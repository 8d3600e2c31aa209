"""The two-tower module on its own, without ranks."""

import numpy as np
import pytest
import torch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.two_tower import SideSpec, TwoTower
from torchrec import KeyedJaggedTensor

USERS, ITEMS, DIM = 9, 7, 6  # a dimension that is padded to 8


def factors():
    rng = np.random.default_rng(2)
    return tuple(rng.normal(0, 0.4, (n, DIM)).astype(np.float32) for n in (USERS, ITEMS))


def build(strategy="init-freeze", kind="residual", counted=False, storage="fp32", **side):
    torch.manual_seed(0)
    config = TwoTowerConfig(
        tables=TablesConfig(strategy=strategy, storage=storage, dim=8, plus_dim=4),
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


@pytest.mark.parametrize("strategy", ["init-train", "init-freeze", "init-freeze-plus"])
@pytest.mark.parametrize("counted", [False, True])
def test_residual_towers_start_with_the_scores_of_the_factorization(strategy, counted):
    user, item = factors()
    model = build(strategy, counted=counted)
    if counted:
        model.load_counts(np.ones((USERS, 1), np.float32), np.zeros((ITEMS, 1), np.float32))
    torch.testing.assert_close(scores(model), torch.from_numpy(user @ item.T))


def test_mlp_towers_do_not():
    user, item = factors()
    assert not torch.allclose(scores(build(kind="mlp")), torch.from_numpy(user @ item.T), atol=0.1)


class Rows:
    """What a batch is to the model."""

    def __init__(self, model, seed=0, negatives=2, rows=5):
        generator = torch.Generator().manual_seed(seed)
        self.user_features = keyed(user=torch.randint(USERS, (rows,), generator=generator))
        self.item_features = keyed(item=torch.randint(ITEMS, (rows * (1 + negatives),), generator=generator))
        self.label, self.log_q = torch.ones(rows), torch.zeros(rows * (1 + negatives))
        self.excluded = self.user_floats = self.item_floats = None


@pytest.mark.parametrize("strategy", ["random", "init-train", "init-freeze", "init-freeze-plus"])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_a_few_steps_lower_the_loss_and_move_what_should_move(strategy, kind):
    model = build(strategy, kind)
    batch = Rows(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tables = {name: p for name, p in model.named_parameters() if "_tables" in name}
    assert (
        sorted({name.split(".")[2] for name in tables})
        == {
            "random": ["item", "user"],
            "init-train": ["item", "user"],
            "init-freeze": [],
            "init-freeze-plus": ["item_plus", "user_plus"],
        }[strategy]
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, shown = model(batch)
        assert not shown.requires_grad
        loss.backward()
        optimizer.step()
        losses.append(float(shown))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "gate.0" not in name)
    if "freeze" in strategy:
        ((_, stored),) = model.user_frozen.decoded("user")
        assert torch.equal(stored[:, :DIM], torch.from_numpy(factors()[0]))


def test_further_features_join_the_tower():
    model = build("init-freeze", "mlp", categorical={"genre": 4}, floats=2)
    users = torch.arange(3)
    features = keyed(user=users, genre=[0, 1, 2])
    first = model.user_vectors(features, torch.zeros(3, 2))
    other_genre = model.user_vectors(keyed(user=users, genre=[3, 1, 2]), torch.zeros(3, 2))
    other_float = model.user_vectors(features, torch.tensor([[0.0, 0], [0, 1], [0, 0]]))
    assert (first != other_genre).any(1).tolist() == [True, False, False]
    assert (first != other_float).any(1).tolist() == [False, True, False]


def test_factors_can_be_swapped():
    user, item = factors()
    model = build()
    model.load_factors(2 * user, item)
    torch.testing.assert_close(scores(model), torch.from_numpy(2 * user @ item.T))


def test_eight_bit_tables_score_nearly_the_same():
    user, item = factors()
    assert (scores(build(storage="int8")) - torch.from_numpy(user @ item.T)).abs().max() < 0.02


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="starts from factors"):
        TwoTower(TwoTowerConfig(), SideSpec(key="user", rows=3), SideSpec(key="item", rows=3))
    with pytest.raises(ValueError, match="expected that of item vectors"):
        TwoTower(TwoTowerConfig(), SideSpec(key="user", rows=3, dim=4), SideSpec(key="item", rows=3, dim=8))
    user, item = factors()
    with pytest.raises(ValueError, match="8 rows, expected 9"):
        build().load_factors(user[:8], item)
