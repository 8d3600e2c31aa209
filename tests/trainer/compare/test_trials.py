"""The search with a fixed number of trials."""

from __future__ import annotations

import pytest

from recpress.trainer.compare.trials import search

AXES = {"a": (0, 1, 2, 3), "b": (0, 10, 20), "c": (0, 100)}


def test_it_measures_as_many_settings_as_it_is_given_each_once() -> None:
    seen = []
    found = search(AXES, lambda choice: seen.append(choice) or sum(choice), 9)
    assert len(seen) == len(set(seen)) == found.tried == 9
    assert found.exist == 24
    assert seen[0] == (0, 0, 0)
    assert found.value == sum(found.best)


def test_every_axis_has_its_turn_and_the_best_setting_is_the_start_of_the_next() -> None:
    seen = []
    found = search(AXES, lambda choice: seen.append(choice) or sum(choice), 4)
    assert seen == [(0, 0, 0), (1, 0, 0), (1, 10, 0), (1, 10, 100)]
    assert found.best == (1, 10, 100)


@pytest.mark.parametrize("trials", [24, 1000])
def test_a_grid_that_is_smaller_is_measured_whole(trials: int) -> None:
    found = search(AXES, lambda choice: -abs(sum(choice) - 112), trials)
    assert (found.tried, found.exist, found.best) == (24, 24, (2, 10, 100))


def test_what_is_refused_is_no_trial() -> None:
    def measure(choice: tuple[int, ...]) -> float:
        if choice[0] % 2 == 0:
            raise ValueError("even")
        return sum(choice)

    found = search(AXES, measure, 5)
    assert found.tried == 5
    assert found.best[0] % 2 == 1
    assert found.refused == "even"
    whole = search(AXES, measure, 100)
    assert (whole.tried, whole.exist) == (12, 12)


def test_where_all_is_refused_there_is_no_best() -> None:
    def measure(choice: tuple[int, ...]) -> float:
        raise ValueError("never")

    found = search({"a": (1, 2)}, measure, 5)
    assert found.best is None
    assert (found.tried, found.refused) == (0, "never")


def test_values_that_are_not_finite_do_not_end_the_search() -> None:
    found = search({"a": (1, 2)}, lambda choice: float("-inf"), 5)
    assert found.best == (1,)
    assert found.tried == 2
