"""The contrastive factorization on small logs: any world size, split users, ids without interactions, divergence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import Factors
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import Contrastive, _OnDevice, aligned, gradients
from recpress.modules.contrastive.losses import make_loss
from recpress.modules.contrastive.row_adam import RowAdam
from tests.ranks import run_on_ranks

GROUPS, USERS, ITEMS = 4, 90, 60
CONFIG = ContrastiveConfig(factors=8, epochs=25, batch_users=16, negatives=32)


def log(seed=0):
    """Users of a group take its items; user 7 and item 5 take none."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, USERS, 3000)
    items = rng.integers(0, ITEMS // GROUPS, 3000) * GROUPS + users % GROUPS
    kept = (users != 7) & (items != 5)
    return users[kept], items[kept]


def fitted(config=CONFIG, pairs=None, values=None):
    model = Contrastive(config, USERS, ITEMS)
    users, items = log() if pairs is None else pairs
    part = slice(model.exchange.rank, None, model.exchange.world)
    model.add(users[part], items[part], values)
    losses = []
    factors = model.fit(lambda report: losses.append(report.loss))
    return factors.users, factors.items, losses, factors.user_counts


def ordered(users, items):
    """Share of the pairs of an item of the user's group and another one that are ranked in this order."""
    own = (torch.arange(USERS)[:, None] % GROUPS) == (torch.arange(ITEMS)[None] % GROUPS)
    own[[7]] = own[:, [5]] = False
    other = ~own
    other[[7]] = other[:, [5]] = False
    scores = users @ items.T
    right = scores[:, :, None] > scores[:, None]
    return float(right[own[:, :, None] & other[:, None]].float().mean())


@pytest.mark.parametrize("world", [1, 2])
def test_users_score_their_group_first_on_any_world_size(world):
    ranks = run_on_ranks(fitted, world)
    users, items = (torch.cat([rank[k] for rank in ranks]) for k in (0, 1))
    assert ordered(users, items) > 0.99
    assert all(rank[2] == ranks[0][2] for rank in ranks)
    assert ranks[0][2][-1] < ranks[0][2][0]
    distinct_users, distinct_items = np.divmod(np.unique(log()[0] * ITEMS + log()[1]), ITEMS)
    assert torch.cat([rank[3] for rank in ranks]).tolist() == np.bincount(distinct_users, minlength=USERS).tolist()
    counts = torch.from_numpy(np.bincount(distinct_items, minlength=ITEMS))
    expected = (torch.arange(USERS) != 7).float(), torch.where(counts > 0, counts**0.05, 0)
    for table, lengths in zip((users, items), expected, strict=True):
        torch.testing.assert_close(table.norm(dim=1), lengths)


@pytest.mark.parametrize("loss", ["softmax", "ccl", "logistic"])
def test_every_loss_learns(loss):
    users, items, losses, _ = fitted(replace(CONFIG, loss=loss, negative_weight=1.0))
    assert ordered(users, items) > 0.95
    assert losses[-1] < losses[0]


def test_the_seed_decides():
    first, again, other = fitted(), fitted(), fitted(replace(CONFIG, seed=1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], other[0])


def test_values_weigh_interactions():
    users, items = np.zeros(2, np.int64), np.array([0, 1])
    strong = fitted(replace(CONFIG, epochs=40), (users, items), np.array([50.0, 1.0], np.float32))
    scores = strong[0][0] @ strong[1].T
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.001), ("temperature", float("nan")), ("batch_limit", 1), ("negatives", 0), ("epochs", 0),
     ("learning_rate", 0.0), ("loss", "hinge")],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value!r}, expected"):
        Contrastive(replace(CONFIG, **{setting: value}), 3, 4)


def test_no_interactions():
    with pytest.raises(ValueError, match="no interactions"):
        Contrastive(CONFIG, 3, 4).fit()


def test_divergence_names_the_epoch_and_the_fix(monkeypatch):
    monkeypatch.setattr("recpress.modules.contrastive.factorization.LONGEST", 0.5)
    with pytest.raises(ValueError, match=r"a vector has the length .* after epoch \d+, .*lower learning_rate"):
        fitted()


def test_a_loss_that_is_not_finite_is_an_error():
    start = Contrastive(CONFIG, 3, 4)
    start.add([0, 1, 2], [0, 1, 3])
    factors = start.fit()
    factors.items[1, 2] = float("nan")
    model = Contrastive(CONFIG, 3, 4)
    model.add([0, 1, 2], [0, 1, 3])
    with pytest.raises(ValueError, match="the loss is nan after epoch 1, expected a finite loss"):
        model.fit(start=factors)


def test_a_step_on_cuda_neither_mixes_devices_nor_waits():
    with FakeTensorMode():
        on = _OnDevice(
            users=torch.empty(2, dtype=torch.int64, device="cuda"),
            indptr=torch.empty(3, dtype=torch.int64, device="cuda"),
            **{
                name: torch.empty(size, dtype=torch.int64, device="cuda")
                for name, size in (("row", 6), ("positive", 6), ("negative", 9), ("by_item", 6), ("item_indptr", 8))
            },
            weight=torch.empty(6, device="cuda"),
            log_expected=torch.empty(9, device="cuda"),
        )
        users, items = (RowAdam(torch.empty(size, 8, device="cuda")) for size in (5, 7))
        user, inverse = users.read(on.users)
        item, _ = items.read(torch.empty(7, dtype=torch.int64, device="cuda"))
        for loss in ("softmax", "ccl", "logistic"):
            made = gradients(make_loss(replace(CONFIG, loss=loss, temperature=0.1)), on, user, item, 7)
            assert [part.device.type for part in made] == ["cuda"] * 3
        users.step(on.users, user, inverse, made[1], 0.1)


def test_a_rotated_space_is_aligned_again():
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(size, 4, generator=generator) for size in (9, 7))
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    turned = Factors(users @ rotation, items @ rotation, 9, 7)
    found = aligned(turned, Factors(users, items, 9, 7), Exchange(None, torch.device("cpu")))
    torch.testing.assert_close(found.users, users, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.items, items, rtol=1e-4, atol=1e-4)
