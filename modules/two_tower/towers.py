"""Towers: networks from the embeddings of a user or an item to the vector that is scored.

A tower returns (vectors (B, out_dim), penalty). The penalty is a scalar that may be added to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchrec import KeyedTensor
from torchrec.distributed.types import LazyAwaitable

from recpress.modules.config import TowersConfig
from recpress.modules.row_source import RowSource, sample_rows

TableOutput = tuple[Literal["frozen", "tables"], str]
"""An output of the tables: its collection, and its key there."""


@dataclass(frozen=True, kw_only=True)
class TowerInput:
    """The parts of a tower's input."""

    base: TableOutput
    """The vector e of the id."""
    dim: int
    """Dimension of e."""
    count: TableOutput | Literal["given"] | None = None
    """The standardized log count of the id: the first column of a table, or an argument of the tower (`given`)."""
    others: Sequence[tuple[TableOutput, int]] = ()
    """Further vectors and their dimensions."""
    floats: int = 0
    """Number of float features."""
    scaled: Sequence[TableOutput] = ()
    """Outputs that are scaled to length one; a vector of zeros remains."""

    @property
    def width(self) -> int:
        """Dimension of all parts together."""
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
        others = [self._output(results, place) for place, _ in self.others]
        if self.floats:
            assert floats is not None
            others.append(floats)
        if self.count is not None and self.count != "given":
            count = results[self.count[0]][self.count[1]][:, :1]
        return self._output(results, self.base), count, others

    def _output(self, results: Mapping[str, KeyedTensor], place: TableOutput) -> torch.Tensor:
        found = results[place[0]][place[1]]
        return nn.functional.normalize(found, dim=1) if place in self.scaled else found


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
        """Nothing to do: the first layer can scale."""

    def forward(
        self,
        frozen: KeyedTensor | None,
        tables: KeyedTensor | None,
        floats: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the tower to the outputs of both collections for the same features.

        count: (B, 1), if it is not in a table.
        """
        e, count, others = self.given.gather(frozen, tables, floats, count)
        parts = [e, *([] if count is None else [count]), *others]
        out = self.mlp(torch.cat(parts, 1) if len(parts) > 1 else e)
        return out, out.new_zeros(())


class ResidualTower(nn.Module):
    """Corrects the vectors of a factorization. Its initial scores are those of the factorization.

        facts f = (log count, |e|), standardized
        (delta, g) = MLP(e / s, f, other features)
        out = (e exp(gate(f)) + s delta, start + g)

    with s the standard deviation of the table. The last layers of MLP and gate start at zero. The last column is a bias
    of the item (start 0), scaled by that of the user (start 1), so the initial scores are e_u . e_i. The penalty is
    mean(delta ** 2): how far the vectors moved, in units of s.
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
        unit = given.base in given.scaled
        self.register_buffer("spread", torch.tensor(given.dim**-0.5 if unit else 1.0))
        self.register_buffer("length", torch.tensor([1.0 if unit else 0.0, 1.0]))

    @torch.no_grad()
    def fit_scale(self, table: RowSource) -> None:
        """Set the standard deviations from rows of the table of e."""
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
        """Apply the tower to the outputs of both collections for the same features.

        count: (B, 1), if it is not in a table.
        """
        e, count, others = self.given.gather(frozen, tables, floats, count)
        length = (e.norm(dim=1, keepdim=True) - self.length[0]) / self.length[1]
        facts = length if count is None else torch.cat([count, length], 1)
        # under autocast, the network may be in half precision, but not what it adds to
        change = self.mlp(torch.cat([e / self.spread, facts, *others], 1)).float()
        delta, bias = change.split([self.given.dim, 1], 1)
        moved = torch.addcmul(delta * self.spread, e, self.gate(facts).float().exp())
        return torch.cat([moved, bias + self.start], 1), delta.square().mean()


def make_tower(config: TowersConfig, given: TowerInput, side: Literal["user", "item"]) -> Tower | ResidualTower:
    """The tower of a configuration."""
    if config.kind == "mlp":
        return Tower(config, given)
    return ResidualTower(config, given, start=1.0 if side == "user" else 0.0)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _wait(result: KeyedTensor | LazyAwaitable[KeyedTensor] | None) -> KeyedTensor:
    """Wait once for the result of a sharded collection, instead of once per key."""
    return result.wait() if isinstance(result, LazyAwaitable) else result
