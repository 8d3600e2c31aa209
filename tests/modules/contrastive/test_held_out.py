"""Early stopping: what is held out, how it is ranked, when the training ends."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive import held_out
from recpress.modules.contrastive.factorization import LAST_RATE, Contrastive, Run

USERS, ITEMS = 80, 40
CONFIG = ContrastiveConfig(factors=8, temperature=0.1, epochs=40, batch_users=16, negatives=32, patience=2)
EXCHANGE = Exchange(None, torch.device("cpu"))


def interactions():
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, 900)
    return users, rng.integers(0, ITEMS // 4, 900) * 4 + users % 4


def csrs():
    builder = InteractionBuilder(USERS, ITEMS, EXCHANGE)
    builder.add(*interactions())
    return builder.build()


def pairs(csr):
    return set(zip(np.repeat(np.arange(csr.num_rows), np.diff(csr.indptr)).tolist(), csr.indices.tolist(), strict=True))


@pytest.mark.parametrize("most", [3000, 20])
def test_one_interaction_per_user_is_held_out(most, monkeypatch):
    monkeypatch.setattr(held_out, "USERS", most)
    by_user, by_item = csrs()
    held = held_out.HeldOut(by_user, np.diff(by_item.indptr), 0, EXCHANGE)
    hidden = set(zip(held.users.tolist(), held.items.tolist(), strict=True))
    assert len(hidden) == len(held.users) == held.rows == len(set(held.users.tolist()))
    assert hidden | pairs(held.train) == pairs(by_user)
    assert not hidden & pairs(held.train)
    assert held.rows == int((np.diff(by_user.indptr) >= 2).sum()) if most == 3000 else 5 < held.rows < 40


def test_a_perfect_ranking_scores_one_and_items_of_the_user_do_not_count():
    by_user, by_item = csrs()
    held = held_out.HeldOut(by_user, np.diff(by_item.indptr), 0, EXCHANGE)
    scores = torch.zeros(USERS, ITEMS)
    for user, item in pairs(held.train):
        scores[user, item] = 2.0
    scores[torch.from_numpy(held.users), torch.from_numpy(held.items)] = 1.0
    assert held.ndcg(scores, torch.eye(ITEMS)) == pytest.approx(1.0)
    assert held.ndcg(-scores, torch.eye(ITEMS)) == 0.0


def run():
    return Run(CONFIG, *csrs(), USERS, ITEMS, EXCHANGE)


def test_training_ends_soon_after_the_checks_stop_to_improve(monkeypatch):
    monkeypatch.setattr(held_out.HeldOut, "ndcg", lambda self, users, items: 0.5)
    training, reports, rates = run(), [], []
    rate = Run._rate
    monkeypatch.setattr(Run, "_rate", lambda self, epochs, steps: rates.append(rate(self, epochs, steps)) or rates[-1])
    training.train(reports.append)
    assert training.checks == [0.5] * 3
    assert training.stopped == 15
    assert [report.epoch for report in reports] == list(range(1, 18))
    assert training.epochs == 17
    steps = len(rates) // 17
    assert rates[16 * steps] < rates[15 * steps] < rates[14 * steps]
    assert rates[-1] < 2 * LAST_RATE * CONFIG.learning_rate + 0.1 * CONFIG.learning_rate


def test_training_that_improves_goes_to_the_end(monkeypatch):
    values = iter(range(100))
    monkeypatch.setattr(held_out.HeldOut, "ndcg", lambda self, users, items: float(next(values)))
    training = run()
    training.train()
    assert (training.epoch, training.stopped) == (40, None)
    assert len(training.checks) == 7  # not in the last tenth, which trains on all interactions


def test_the_checks_see_the_vectors_improve():
    training = run()
    training.train()
    assert max(training.checks) > 0.3
    model = Contrastive(replace(CONFIG, patience=0), USERS, ITEMS)
    model.add(*interactions())
    assert model.fit().users.shape == (USERS, 8)
