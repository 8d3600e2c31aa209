"""Paired differences, ties and places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.trainer.compare.ties import all_differences, auc_by_row, difference, paired_difference, places, student_p
from recpress.trainer.evaluate.metrics import pointwise_auc


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (1, 1, 0.5),
        (4.302653, 2, 0.05),
        (2, 9, 0.076553),
        (-2, 10, 0.073388),
        (2.042272, 30, 0.05),
        (1.959964, 10**6, 0.05),
    ],
)
def test_p_values_of_students_t_are_those_of_the_tables(t: float, freedom: int, p: float) -> None:
    assert student_p(t, freedom) == pytest.approx(p, rel=1e-5)


def test_the_noise_is_that_of_users_and_seeds_together() -> None:
    a = [np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])]
    b = [np.array([0.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0, 0.0])]
    mean, noise, p = paired_difference(a, b)
    of_users = np.var([0.5, 0.5, 0.0, 0.5], ddof=1) / 4
    of_seeds = np.var([0.5, 0.25], ddof=1) / 2
    assert mean == pytest.approx(0.375)
    error = np.sqrt(of_users + of_seeds)
    freedom = error**4 / (of_users**2 / 3 + of_seeds**2 / 1)  # 3.8, rounded down
    assert 3 < freedom < 4
    assert noise == pytest.approx(3.182446 * error, rel=1e-5)
    assert p == pytest.approx(student_p(mean / error, 3))


def test_one_seed_has_the_noise_of_the_users_and_users_without_a_value_do_not_count() -> None:
    a, b = np.array([1.0, 2.0, np.nan, 3.0]), np.array([0.0, 1.0, 1.0, 0.0])
    mean, noise, p = paired_difference([a], [b])
    assert mean == pytest.approx(5 / 3)
    assert noise == pytest.approx(4.302653 * np.sqrt(np.var([1, 1, 3], ddof=1) / 3), rel=1e-5)
    assert p == pytest.approx(student_p(2.5, 2))


def test_seeds_that_disagree_make_a_tie_of_what_the_users_of_one_seed_call_significant() -> None:
    """A difference that is the same for all users of a seed, and not the same for the seeds."""
    base, spread = np.random.default_rng(0).random(5000), 0.02 * np.random.default_rng(1).standard_normal(5000)
    shifts = (0.002, 0.009, 0.001)
    assert paired_difference([base + spread + shifts[0]], [base])[2] < 0.001
    assert paired_difference([base + spread + shift for shift in shifts], [base] * 3)[2] > 0.05


def test_equal_methods_are_called_different_in_five_of_a_hundred_tests() -> None:
    """Users and seeds both random, as in a comparison."""
    rng = np.random.default_rng(7)
    called = 0
    for _ in range(400):
        values = rng.random((2, 3, 80)) + 0.05 * rng.standard_normal((2, 3, 1))
        called += paired_difference([*values[0]], [*values[1]])[2] <= 0.05
    assert called <= 400 * 0.05 + 3 * np.sqrt(400 * 0.05 * 0.95)


def test_one_case_is_level_only_with_itself_and_none_is_level_with_all() -> None:
    one, other, none = np.array([0.5]), np.array([0.25]), np.array([np.nan])
    assert paired_difference([one], [one]) == (0.0, 0.0, 1.0)
    assert paired_difference([one], [other]) == (0.25, 0.0, 0.0)
    assert paired_difference([one], [none])[2] == 1.0


def test_a_method_with_one_run_stands_for_every_seed() -> None:
    values = np.random.default_rng(0).random(100)
    found = all_differences({"popularity": [values], "other": [values + 0.1, values + 0.3]})
    assert difference(found, "other", "popularity").mean == pytest.approx(0.2)


def test_the_same_values_are_level_and_a_shift_of_all_users_is_not() -> None:
    values = np.random.default_rng(0).random(100)
    found = all_differences({"a": [values], "same": [values.copy()], "up": [values + 0.01]})
    assert difference(found, "a", "same").level
    up = difference(found, "up", "a")
    assert up.mean == pytest.approx(0.01)
    assert not up.level
    assert up.above
    assert not difference(found, "a", "up").above
    assert up.in_words() == "+0.0100 ± 0.0000, p < 0.001"
    assert difference(found, "a", "up").mean == pytest.approx(-0.01)
    with pytest.raises(KeyError):
        difference(found, "a", "b")


def test_methods_within_noise_share_a_place() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(1000)
    found = all_differences(
        {"best": [base + 1], "x": [base], "y": [base + 0.1 * rng.standard_normal(1000)], "last": [base - 1]}
    )
    assert places(["x", "last", "best", "y"], found) == {"best": "1", "x": "2=", "y": "2=", "last": "4"}


def test_auc_by_row_has_the_mean_and_the_variance_of_delong() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(60) < 0.3).astype(np.float32)
    scores = np.round(rng.random(60) + 0.3 * labels, 1)  # with ties
    found = auc_by_row(scores, labels)
    assert found.mean() == pytest.approx(pointwise_auc(torch.from_numpy(scores), torch.from_numpy(labels)))
    positive, negative = scores[labels == 1], scores[labels == 0]
    won = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    delong = won.mean(1).var() / len(positive) + won.mean(0).var() / len(negative)
    assert found.var() / len(found) == pytest.approx(delong)
