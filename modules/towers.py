"""Towers: networks from what the tables give of a user or an item to the vector that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from recpress.modules.config import TowersConfig
from torch import nn
from torchrec import KeyedTensor
from torchrec.distributed.types import LazyAwaitable

Source = tuple[Literal["frozen", "tables"], str]
"""Where a part of the input comes from: which collection's result, and its key there."""


class Tower(nn.Module):
    """MLP over the id's vector e and whatever else is known of the id; `residual` adds e to its output.

    The residual tower's last layer is zero at the start: out = e, and the ranking is the factorization's.
    """

    def __init__(
        self,
        config: TowersConfig,
        *,
        base: Source,
        dim: int,
        others: Sequence[tuple[Source, int]] = (),
        floats: int = 0,
    ) -> None:
        """
        Args:
            base: where e comes from, of length `dim`.
            others: further vectors and their lengths.
            floats: number of float features.
        """
        super().__init__()
        self.base, self.others, self.floats = base, [source for source, _ in others], floats
        self.residual = config.kind == "residual"
        self.out_dim = dim if self.residual else config.dim
        layers: list[nn.Module] = []
        width = dim + sum(length for _, length in others) + floats
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            if config.dropout:
                layers.append(nn.Dropout(config.dropout))
            width = hidden
        last = nn.Linear(width, self.out_dim)
        if self.residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)

    def forward(
        self,
        frozen: KeyedTensor | None,
        tables: KeyedTensor | None,
        floats: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, out_dim). `frozen` and `tables` are what the two collections gave for the same features."""
        results = {"frozen": _wait(frozen), "tables": _wait(tables)}
        vector = results[self.base[0]][self.base[1]]
        parts = [vector, *(results[where][key] for where, key in self.others)]
        if self.floats:
            assert floats is not None
            assert floats.shape[1] == self.floats
            parts.append(floats)
        output = self.mlp(torch.cat(parts, 1) if len(parts) > 1 else vector)
        return vector + output if self.residual else output


def _wait(result: KeyedTensor | LazyAwaitable[KeyedTensor] | None) -> KeyedTensor:
    """A sharded collection gives a promise; wait for it once, not once a key."""
    return result.wait() if isinstance(result, LazyAwaitable) else result
