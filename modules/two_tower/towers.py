"""Towers: networks from what the tables give of a user or an item to the vector that is scored.

A tower returns (vectors (B, out_dim), penalty): the penalty, a number, may join the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchrec import KeyedTensor
from torchrec.distributed.types import LazyAwaitable

from recpress.modules.config import TowersConfig
from recpress.modules.row_source import RowSource, sample_rows

Source = tuple[Literal["frozen", "tables"], str]
"""Where a part of the input comes from: which collection's result, and its key there."""


@dataclass(frozen=True, kw_only=True)
class TowerInput:
    """What a tower is given of an id."""

    base: Source
    """The id's vector e."""
    dim: int
    """Length of e."""
    count: Source | Literal["given"] | None = None
    """The id's standardized log count: in the first column of a table's rows, or given to the tower as a number."""
    others: Sequence[tuple[Source, int]] = ()
    """Further vectors and their lengths."""
    floats: int = 0
    """Number of float features."""

    @property
    def width(self) -> int:
        """Of all parts together."""
        counted = 0 if self.count is None else 1
        return self.dim + counted + sum(length for _, length in self.others) + self.floats

    def gather(
        self,
        frozen: KeyedTensor | None,
        tables: KeyedTensor | None,
        floats: torch.Tensor | None,
        count: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """(e, count (B, 1) or None, the other parts)."""
        results = {"frozen": _wait(frozen), "tables": _wait(tables)}
        others = [results[where][key] for (where, key), _ in self.others]
        if self.floats:
            assert floats is not None
            others.append(floats)
        if self.count is not None and self.count != "given":
            count = results[self.count[0]][self.count[1]][:, :1]
        return results[self.base[0]][self.base[1]], count, others


class Tower(nn.Module):
    """out = MLP(e, log count, other features)."""

    def __init__(self, config: TowersConfig, given: TowerInput) -> None:
        super().__init__()
        self.given, self.out_dim = given, config.dim
        layers: list[nn.Module] = []
        width = given.width
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(config.dropout)]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, self.out_dim))

    def fit_scale(self, table: RowSource) -> None:
        """Nothing to fit: the first layer is free to scale."""

    def forward(
        self,
        frozen: KeyedTensor | None,
        tables: KeyedTensor | None,
        floats: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`frozen` and `tables` are what the two collections gave for the same features; `count` is (B, 1), where it
        comes from no table."""
        e, count, others = self.given.gather(frozen, tables, floats, count)
        parts = [e, *([] if count is None else [count]), *others]
        out = self.mlp(torch.cat(parts, 1) if len(parts) > 1 else e)
        return out, out.new_zeros(())


class ResidualTower(nn.Module):
    """Corrects a factorization's vectors, and begins with their own scores.

        facts f = (log count, |e|), standardized
        (delta, g) = MLP(e / s, f, other features)
        out = (e exp(gate(f)) + s delta, start + g)

    with s the standard deviation of the table. The last layers of MLP and gate start at zero. The last
    place is a bias of the item (start 0), scaled by the user's (start 1): the first scores are e_u . e_i.
    The penalty is mean(delta ** 2): how far the vectors moved, in units of the table's spread.
    """

    def __init__(self, config: TowersConfig, given: TowerInput, *, start: float) -> None:
        super().__init__()
        self.given, self.start, self.out_dim = given, start, given.dim + 1
        layers: list[nn.Module] = []
        width = given.width + 1
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout)]
            width = hidden
        self.mlp = nn.Sequential(*layers, _zero(nn.Linear(width, self.out_dim)))
        self.spread: torch.Tensor  # s
        self.length: torch.Tensor  # mean and standard deviation of |e|
        facts = 1 if given.count is None else 2
        self.gate = nn.Sequential(nn.Linear(facts, 16), nn.GELU(), _zero(nn.Linear(16, 1)))
        self.register_buffer("spread", torch.tensor(1.0))
        self.register_buffer("length", torch.tensor([0.0, 1.0]))

    @torch.no_grad()
    def fit_scale(self, table: RowSource) -> None:
        """Take the spreads from rows of the table that e comes from."""
        rows = sample_rows(table)
        lengths = rows.norm(dim=1)
        self.spread.fill_(rows.std(correction=0).clamp_min(1e-12))
        self.length.copy_(
            torch.stack([lengths.mean(), lengths.std(correction=0).clamp_min(1e-6 + 0.01 * float(lengths.mean()))])
        )

    def forward(
        self,
        frozen: KeyedTensor | None,
        tables: KeyedTensor | None,
        floats: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`frozen` and `tables` are what the two collections gave for the same features; `count` is (B, 1), where it
        comes from no table."""
        e, count, others = self.given.gather(frozen, tables, floats, count)
        length = (e.norm(dim=1, keepdim=True) - self.length[0]) / self.length[1]
        facts = length if count is None else torch.cat([count, length], 1)
        change = self.mlp(torch.cat([e / self.spread, facts, *others], 1))
        delta, place = change.split([self.given.dim, 1], 1)
        moved = torch.addcmul(delta * self.spread, e, self.gate(facts).exp())
        return torch.cat([moved, place + self.start], 1), delta.square().mean()


def make_tower(config: TowersConfig, given: TowerInput, side: Literal["user", "item"]) -> Tower | ResidualTower:
    """The tower that the configuration names."""
    if config.kind == "mlp":
        return Tower(config, given)
    return ResidualTower(config, given, start=1.0 if side == "user" else 0.0)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _wait(result: KeyedTensor | LazyAwaitable[KeyedTensor] | None) -> KeyedTensor:
    """A sharded collection gives a promise; wait for it once, not once a key."""
    return result.wait() if isinstance(result, LazyAwaitable) else result
