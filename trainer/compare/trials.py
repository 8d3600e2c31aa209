"""The search for a setting with a fixed number of trials, the same for every method."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Choice = tuple[Any, ...]
"""A value of each axis, in the order of the axes."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found."""

    best: Choice | None
    """None if every setting was refused."""
    value: float
    """Of the best setting; the larger the better."""
    tried: int
    """Settings that were measured."""
    exist: int
    """Settings that exist, without those that were refused."""
    refused: str
    """Why the last refused setting was refused."""


def search(axes: Mapping[str, Sequence[Any]], measure: Callable[[Choice], float], trials: int) -> Search:
    """Measure at most `trials` settings of the grid `axes` and return the best. Deterministic.

    The first value of each axis makes the first setting. Each next setting differs from the best one so far in one
    axis, the axes taking turns; if no such setting is left, the rest of the grid follows in a fixed random order.

    Args:
        axes: name -> values.
        measure: the quality of a setting. A ValueError refuses the setting, which then is no trial.
    """
    values = [list(dict.fromkeys(axis)) for axis in axes.values()]
    best, highest, refused = None, -math.inf, ""
    measured: dict[Choice, float | None] = {}
    center: Choice = tuple(axis[0] for axis in values)
    candidates = _candidates(values)
    while sum(value is not None for value in measured.values()) < trials:
        choice = center if center not in measured else candidates(center, measured)
        if choice is None:
            break
        try:
            measured[choice] = measure(choice)
        except ValueError as error:
            measured[choice], refused = None, str(error)
            continue
        value = measured[choice]
        assert value is not None
        if value > highest or best is None:
            best, highest, center = choice, value, choice
    refusals = sum(value is None for value in measured.values())
    return Search(
        best=best,
        value=highest,
        tried=len(measured) - refusals,
        exist=math.prod(map(len, values)) - refusals,
        refused=refused,
    )


def _candidates(values: list[list[Any]]) -> Callable[[Choice, Mapping[Choice, Any]], Choice | None]:
    """The next setting to measure, given the best one and those that were measured; None after the last."""
    turn = itertools.cycle(range(len(values)))
    rest = _shuffled(values)

    def following(best: Choice, measured: Mapping[Choice, Any]) -> Choice | None:
        for _ in values:
            axis = next(turn)
            for value in values[axis]:
                choice = (*best[:axis], value, *best[axis + 1 :])
                if choice not in measured:
                    return choice
        return next((choice for choice in rest if choice not in measured), None)

    return following


def _shuffled(values: list[list[Any]]) -> Iterator[Choice]:
    grid = list(itertools.product(*values))
    random.Random(0).shuffle(grid)
    return iter(grid)
