"""Settings that do not depend on the size of the log, and their choice on held-out examples."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.modules.als import auto as als_auto
from recpress.modules.als.auto import absolute, take_sample
from recpress.modules.als.checks import check_factors
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.fold_in import fold_in
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ALSConfig, ALSParameters
from tests.modules.als.auto_cases import ITEMS, USERS, fit, planted
from tests.ranks import run_on_ranks


def csrs(users, items, values=None, shape=(USERS, ITEMS)):
    exchange = Exchange(None, torch.device("cpu"))
    builder = InteractionBuilder(*shape, exchange)
    builder.add(users, items, values)
    return *builder.build(), exchange


def test_parameters_are_those_of_the_formulas():
    users, items, values = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 1, 3]), np.array([1, 2, 1, 1, 1, 4.0])
    config = ALSConfig(
        factors=4, sweeps=2, unobserved_ratio=2.0, mean_penalty=3.0, item_exponent=0.5, confidence=2.0, auto=False
    )
    found = absolute(config, *csrs(users, items, values, (5, 6)))
    weight, active_users, active_items = 2.0 * values.sum(), 3, 3  # ids without an interaction do not count
    unobserved = 2.0 * weight / (active_users * active_items)
    degrees = np.array([2, 1, 3])
    assert found.unobserved_weight == pytest.approx(unobserved)
    mean = np.sqrt(degrees + unobserved * active_items).mean()
    assert found.regularization == pytest.approx(3.0 * (weight / 6) / mean)
    counts = np.array([2, 3, 0, 1])[items]
    assert found.item_scale == pytest.approx(values.sum() / (values / np.sqrt(counts)).sum())


def test_the_unit_of_the_confidence_does_not_matter():
    users, items = planted()
    config = ALSConfig(
        factors=8, sweeps=6, unobserved_ratio=4.0, mean_penalty=3.0, item_exponent=0.25, solver="cholesky"
    )
    _, one = fit(config, users, items)
    # with frequency_exponent 0.5 the penalties scale too, except for the counts within them
    _, two = fit(replace(config, frequency_exponent=0.0), users, items)
    _, three = fit(replace(config, frequency_exponent=0.0, confidence=10.0), users, items)
    assert torch.allclose(two.users @ two.items.T, three.users @ three.items.T, atol=2e-3)
    assert not torch.allclose(one.users @ one.items.T, two.users @ two.items.T, atol=2e-3)


def test_absolute_parameters_are_taken_as_they_are():
    config = ALSConfig(factors=4, sweeps=1, unobserved_weight=0.3, regularization=7.0, auto=False)
    als, _ = fit(config, *planted())
    assert (als.parameters.unobserved_weight, als.parameters.regularization) == (0.3, 7.0)
    assert als.choice is None


@pytest.mark.parametrize("solver", ["cholesky", "auto"])
@pytest.mark.parametrize("valued", [False, True])
def test_item_exponent_weighs_interactions_by_their_items_count(solver, valued):
    users, items = (column[:3000] for column in planted())
    keys = np.unique(users * ITEMS + items)
    users, items = keys // ITEMS, keys % ITEMS
    values = np.random.default_rng(0).integers(1, 4, len(keys)).astype(np.float32) if valued else None
    base = ALSParameters(factors=5, sweeps=4, confidence=1.0, unobserved_weight=0.1, regularization=2.0, solver=solver)
    counts = np.bincount(items, minlength=ITEMS)
    by_hand = 1.7 * counts[items] ** -0.5 * (1.0 if values is None else values)
    _, want = fit(base, users, items, by_hand.astype(np.float32))
    _, found = fit(replace(base, item_exponent=0.5, item_scale=1.7), users, items, values)
    assert torch.allclose(found.users, want.users, atol=1e-5)
    assert torch.allclose(found.items, want.items, atol=1e-5)


def test_new_users_fold_in_with_the_weights_of_the_fit():
    users, items = planted()
    config = ALSConfig(
        factors=5, sweeps=3, unobserved_ratio=4.0, mean_penalty=3.0, item_exponent=0.5, solver="cholesky"
    )
    als, factors = fit(config, users, items)
    by_user, _, _ = csrs(users, items)
    assert by_user.values is not None
    given = (by_user.indptr, by_user.indices, by_user.values)
    with pytest.raises(ValueError, match="other_counts"):
        fold_in(als.parameters, factors.items, *given)
    rows = fold_in(als.parameters, factors.items, *given, other_counts=factors.item_counts.numpy())
    ahead = ((rows @ factors.items.T) * (factors.users @ factors.items.T)).sum()
    # the users of the fit were solved from the items of a sweep before: nearly the same
    norms = (rows @ factors.items.T).norm() * (factors.users @ factors.items.T).norm()
    assert ahead / norms > 0.99


def test_choice_is_recorded_and_the_same_again():
    als, _ = fit(ALSConfig(max_factors=16), *planted())
    again, _ = fit(ALSConfig(max_factors=16), *planted())
    choice = als.choice
    assert choice.settings == again.choice.settings
    assert choice.trials == again.choice.trials
    assert {"unobserved_ratio", "mean_penalty", "item_exponent", "factors", "sweeps"} <= choice.settings.keys()
    assert choice.rows > 300
    assert choice.runner_up["settings"] != choice.settings
    assert choice.ndcg > 1.2 * choice.popularity
    assert choice.above_popularity
    assert als.parameters.factors <= 16
    assert "runner-up" in choice.line()
    assert not check_factors(_, als)


def test_choice_leaves_alone_what_was_given():
    als, factors = fit(ALSConfig(factors=12, mean_penalty=5.0, sweeps=3), *planted())
    assert factors.dim == 12
    assert als.choice.settings["mean_penalty"] == 5.0
    assert als.choice.settings["sweeps"] == 3
    assert {trial["settings"]["mean_penalty"] for trial in als.choice.trials} == {5.0}
    given = ALSConfig(factors=8, sweeps=3, unobserved_ratio=4.0, mean_penalty=3.0, item_exponent=0.0)
    als, _ = fit(given, *planted())
    assert len(als.choice.trials) == 1
    assert als.choice.above_popularity
    assert als.choice.settings["unobserved_ratio"] == 4.0


def test_more_candidates_are_drawn_from_wider_ranges():
    als, _ = fit(ALSConfig(factors=8, auto_trials=14, auto_cost=3.0), *planted())
    first = [trial for trial in als.choice.trials if trial["sweeps"] == 3]
    assert len({str(trial["settings"]) for trial in first}) == 14


def test_a_log_too_small_to_choose_takes_the_defaults():
    als, factors = fit(ALSConfig(), np.arange(10), np.arange(10), shape=(10, 10))
    assert als.choice.rows == 0
    assert "too few" in als.choice.line()
    assert json.loads(json.dumps(als.choice.describe(), allow_nan=False))["ndcg"] is None
    assert factors.dim == als_auto.DEFAULTS["factors"]


@pytest.mark.parametrize("metric", ["sampled", "full"])
def test_hidden_items_are_ranked_as_by_brute_force(metric):
    users, items = planted()
    by_user, _, exchange = csrs(users, items)
    sample = take_sample(by_user, 1.0, 3, exchange)
    rng = np.random.default_rng(0)
    x, y = rng.random((sample.num_users, 4)), rng.random((sample.num_items, 4))
    rank = als_auto.hidden_ranker(sample, metric, 3, exchange)
    found = rank(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    met = np.zeros((sample.num_users, sample.num_items), bool)
    met[sample.users, sample.items] = True
    scores = x.astype(np.float32) @ y.astype(np.float32).T
    hidden = scores[sample.hidden_users, sample.hidden_items]
    others = ~met[sample.hidden_users]
    others[np.arange(len(hidden)), sample.hidden_items] = False
    ahead = ((scores[sample.hidden_users] >= hidden[:, None]) & others).sum(1)
    if metric == "full":
        want = np.where(ahead < 10, 1 / np.log2(ahead + 2), 0)
        assert np.allclose(found, want)
    else:  # 99 of the others: the mean share of the others ahead is that of all of them
        chance = ahead / others.sum(1)
        assert (found[ahead == 0] == 1).all()
        assert found[chance < 0.02].mean() > 0.7 > 0.1 > found[chance > 0.3].mean()


def test_a_pool_of_items_tells_the_position_among_all(monkeypatch):
    by_user, _, exchange = csrs(*planted())
    sample = take_sample(by_user, 1.0, 0, exchange)
    rng = np.random.default_rng(0)
    vectors = (
        torch.from_numpy(rng.random((sample.num_users, 4))).float(),
        torch.from_numpy(rng.random((sample.num_items, 4))).float(),
    )
    among_all = als_auto.hidden_ranker(sample, "full", 0, exchange)(*vectors)
    monkeypatch.setattr(als_auto, "_ITEMS", 80)
    among_some = als_auto.hidden_ranker(sample, "full", 0, exchange)(*vectors)
    assert among_some.mean() == pytest.approx(among_all.mean(), rel=0.5)
    assert (among_some[among_all == 1] == 1).all()


def test_hidden_items_are_not_in_the_sample():
    by_user, _, exchange = csrs(*planted())
    sample = take_sample(by_user, 0.5, 0, exchange)
    kept = set(zip(sample.users.tolist(), sample.items.tolist(), strict=True))
    hidden = set(zip(sample.hidden_users.tolist(), sample.hidden_items.tolist(), strict=True))
    assert not kept & hidden
    assert 0.4 * USERS < sample.num_users < 0.6 * USERS
    assert len(hidden) > 0.9 * sample.num_users


def test_absolute_settings_are_named_in_the_choice_and_in_the_fix():
    users, items = planted()
    als, factors = fit(ALSConfig(max_factors=8, sweeps=2, unobserved_weight=1.0, regularization=1e4), users, items)
    line = als.choice.line()
    assert "regularization 10000" in line
    assert "unobserved_weight 1" in line
    assert "mean_penalty" not in line
    assert "unobserved_ratio" not in line
    warnings = check_factors(factors, als)
    assert "lower regularization" in warnings[0]
    assert not any("mean_penalty" in warning for warning in warnings)


def on_rank():
    users, items = planted()
    part = slice(dist.get_rank(), None, dist.get_world_size())
    als = ALS(ALSConfig(max_factors=16), USERS, ITEMS)
    als.add(users[part], items[part])
    factors = als.fit()
    return als.choice.settings, als.choice.trials, als.separation, check_factors(factors, als)


def test_ranks_choose_alike():
    alone, _ = fit(ALSConfig(max_factors=16), *planted())
    for settings, trials, separation, warnings in run_on_ranks(on_rank, world=2):
        assert settings == alone.choice.settings
        assert [t["settings"] for t in trials] == [t["settings"] for t in alone.choice.trials]
        assert np.allclose([t["ndcg"] for t in trials], [t["ndcg"] for t in alone.choice.trials], atol=2e-3)
        assert separation > 0.8
        assert not warnings
