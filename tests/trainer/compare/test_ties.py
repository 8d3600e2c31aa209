"""Paired differences, ties and places."""

from __future__ import annotations

import numpy as np
import pytest

from recpress.trainer.compare.ties import all_differences, difference, paired_difference, places


def test_the_noise_is_two_standard_errors_of_users_and_seeds() -> None:
    a = [np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])]
    b = [np.array([0.0, 0.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0, 0.0])]
    mean, noise = paired_difference(a, b)
    of_users = np.var([0.5, 0.5, 0.0, 0.5], ddof=1) / 4
    of_seeds = np.var([0.5, 0.25], ddof=1) / 2
    assert mean == pytest.approx(0.375)
    assert noise == pytest.approx(2 * np.sqrt(of_users + of_seeds))


def test_one_seed_has_the_noise_of_the_users_and_users_without_a_value_do_not_count() -> None:
    a, b = np.array([1.0, 2.0, np.nan, 3.0]), np.array([0.0, 1.0, 1.0, 0.0])
    mean, noise = paired_difference([a], [b])
    assert mean == pytest.approx(5 / 3)
    assert noise == pytest.approx(2 * np.sqrt(np.var([1, 1, 3], ddof=1) / 3))


def test_the_same_values_are_level_and_a_shift_of_all_users_is_not() -> None:
    values = np.random.default_rng(0).random(100)
    found = all_differences({"a": [values], "same": [values.copy()], "up": [values + 0.01]})
    assert difference(found, "a", "same").level
    up = difference(found, "up", "a")
    assert up.mean == pytest.approx(0.01)
    assert not up.level
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
