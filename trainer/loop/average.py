"""Exponential moving average of the dense weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The mean of the weights after each step so far. The share of a step falls by the factor `decay` with each later
    step; the initial weights have none. Ranks with the same weights have the same averages.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._weights = [parameter.detach() for parameter in parameters]
        self.values = [weight.clone() for weight in self._weights]
        """In the order of the parameters; before the first step, the initial weights."""

    def update(self, steps: int) -> None:
        """After step `steps`, from 1."""
        torch._foreach_lerp_(self.values, self._weights, (1 - self.decay) / (1 - self.decay**steps))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block, the model has the averages."""
        weights = [weight.clone() for weight in self._weights]
        self.publish()
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, weights)

    def publish(self) -> None:
        """Give the model the averages for good."""
        torch._foreach_copy_(self._weights, self.values)
