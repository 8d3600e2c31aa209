"""The choice of temperature, epochs and method on hidden items."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive import auto
from recpress.modules.contrastive.factorization import DEFAULTS
from tests.ranks import run_on_ranks

USERS, ITEMS, GROUPS = 200, 60, 4
CONFIG = ContrastiveConfig(factors=8, batch_users=32, negatives=32)


SHORT = ((3, 3), (6, 2), (12, 1))


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(auto, "ROUNDS", SHORT)


def interactions(users=USERS):
    rng = np.random.default_rng(0)
    who = rng.integers(0, users, 12 * users)
    return who, rng.integers(0, ITEMS // GROUPS, len(who)) * GROUPS + who % GROUPS


def by_user(users=USERS):
    exchange = Exchange(None, torch.device("cpu"))
    builder = InteractionBuilder(users, ITEMS, exchange)
    builder.add(*(column[exchange.rank :: exchange.world] for column in interactions(users)))
    return builder.build()[0], exchange


def useless(sample):
    blocks = RowBlocks(sample.num_users, dist.get_world_size() if dist.is_initialized() else 1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.ones(blocks.size(rank), 4), -torch.arange(float(sample.num_items))[:, None].expand(-1, 4) * 1e-3


def perfect(sample):
    """Vectors that rank the hidden item of each user first."""
    items = torch.eye(sample.num_items)
    users = torch.zeros(sample.num_users, sample.num_items)
    users[sample.hidden_users] = items[sample.hidden_items]
    return users, items


@pytest.mark.parametrize("metric", ["sampled", "full"])
def test_the_settings_are_chosen_by_halving(metric):
    choice = auto.choose(CONFIG, *by_user(), metric)
    assert choice.method == "softmax"
    runs, exponents = choice.trials[:6], choice.trials[6:]
    assert [t["epochs"] for t in runs] == [3, 3, 3, 6, 6, 12]
    best = max(runs, key=lambda trial: trial["ndcg"])
    assert choice.settings["temperature"] == best["temperature"]
    assert choice.settings["epochs"] == round(1.25 * best["epochs"])
    assert choice.runner_up["temperature"] != best["temperature"]
    assert [t["popularity_exponent"] for t in exponents] == list(auto.POPULARITY_EXPONENTS)
    assert best["ndcg"] in [t["ndcg"] for t in exponents]  # of the default
    highest = max(exponents, key=lambda trial: trial["ndcg"])
    assert choice.settings["popularity_exponent"] == highest["popularity_exponent"]
    assert choice.ndcg["softmax"] == pytest.approx(highest["ndcg"], abs=1e-6)
    assert auto.choose(CONFIG, *by_user(), metric).describe() == choice.describe()
    assert f"{choice.rows:,} held-out examples; runner-up temperature" in choice.line()


def test_the_choice_stops_when_longer_runs_are_no_better(monkeypatch):
    monkeypatch.setattr(auto, "ROUNDS", ((12, 3), (1, 2), (2, 1)))
    choice = auto.choose(CONFIG, *by_user(), "full")
    assert [t["epochs"] for t in choice.trials if "epochs" in t] == [12, 12, 12, 1, 1]
    assert choice.settings["epochs"] == 15


def test_popular_items_rank_first_where_that_is_so():
    """Half of the items of a group are drawn ten times as often, and users have no other taste."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 8)
    popular = rng.random(len(users)) < 0.9
    items = (rng.integers(0, 5, len(users)) + 5 * ~popular * rng.integers(1, 10, len(users))) * GROUPS + users % GROUPS
    exchange = Exchange(None, torch.device("cpu"))
    builder = InteractionBuilder(400, 50 * GROUPS, exchange)
    builder.add(users, items)
    choice = auto.choose(CONFIG, builder.build()[0], exchange, "full")
    of = {t["popularity_exponent"]: t["ndcg"] for t in choice.trials if "popularity_exponent" in t}
    assert choice.settings["popularity_exponent"] > 0
    assert of[choice.settings["popularity_exponent"]] > of[0]


def test_least_squares_stays_unless_softmax_is_clearly_better():
    assert auto.choose(CONFIG, *by_user(), "full", useless).method == "softmax"
    choice = auto.choose(CONFIG, *by_user(), "full", perfect)
    assert choice.method == "als"
    assert choice.runner_up["method"] == "softmax"


def test_given_settings_are_kept():
    given = replace(CONFIG, temperature=0.25, epochs=6, popularity_exponent=0.3)
    choice = auto.choose(given, *by_user(), "full", useless)
    assert choice.settings == {"temperature": 0.25, "epochs": 6, "popularity_exponent": 0.3}
    assert [(t["temperature"], t["epochs"]) for t in choice.trials] == [(0.25, 6)]


def test_too_few_users_keep_the_defaults():
    choice = auto.choose(CONFIG, *by_user(users=30), "full", useless)
    assert (choice.method, choice.settings, choice.rows) == ("als", DEFAULTS, 0)
    assert "too few" in choice.line()


def chosen():
    auto.ROUNDS = SHORT  # in a process of its own
    return auto.choose(CONFIG, *by_user(), "full", useless)


def test_two_ranks_choose_together():
    first, second = run_on_ranks(chosen, 2)
    assert first.describe() == second.describe()
    assert first.method == "softmax"
