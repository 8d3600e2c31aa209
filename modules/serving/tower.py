"""One side of the two-tower network for serving: dense ids -> vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from recpress.modules.serving.bags import ServedTable
from recpress.modules.serving.rows import ServedRows
from recpress.modules.serving.tensors import Holder, LargeTensors, Stored


class PerId(Holder):
    """Numbers of an id: ids (n,) -> (n,) or (n, F).

    Args:
        values: (num_ids + 1,) or (num_ids + 1, F); the last are those of unknown ids.
    """

    def __init__(self, values: Stored, large: LargeTensors) -> None:
        super().__init__(large)
        self.num_ids = values.tensor.shape[0] - 1
        self.hold("values", values)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.held("values")[torch.where((ids < 0) | (ids >= self.num_ids), self.num_ids, ids)]


class ServedCounts(nn.Module):
    """The log count of an id: ids (n,) -> (n, 1) float32, low + step * values."""

    def __init__(self, values: PerId, low: float = 0.0, step: float = 1.0) -> None:
        super().__init__()
        self.values, self.low, self.step = values, low, step

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.low + self.step * self.values(ids).float())[:, None]


class ServedFeature(nn.Module):
    """A categorical feature with one value per id: ids (n,) -> (n, dim), the row of the value."""

    def __init__(self, values: PerId, rows: ServedRows) -> None:
        super().__init__()
        self.values, self.rows = values, rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(self.values(ids).long())


class LookUp(NamedTuple):
    """One input of the tower."""

    where: Literal["frozen", "tables"]
    key: str
    module: nn.Module
    """ids (n,) -> (n, dim)."""


class History(NamedTuple):
    """The items of users as an input of the tower."""

    where: Literal["frozen", "tables"]
    key: str
    table: ServedTable
    most: int
    """Only the last so many items of a user count."""


class ServedTower(nn.Module):
    """Dense ids (B,) int64 -> vectors (B, d) float32.

    With a history, of users: ids, the items of all users (n,) int64, and the number of items of each user (B,) int64 ->
    vectors.

    Args:
        look_ups: of the tables, in the collections that the tower knows.
        tower: of `two_tower.towers`; None: the vectors are the rows of the only look-up.
        count: of the tower's argument `count`.
    """

    def __init__(
        self,
        look_ups: Sequence[LookUp],
        tower: nn.Module | None,
        *,
        count: ServedCounts | None = None,
        floats: PerId | None = None,
        history: History | None = None,
    ) -> None:
        super().__init__()
        self.history = None if history is None else history.table
        self._history_place = ("", "", 0) if history is None else (history.where, history.key, history.most)
        self.tower, self.count, self.floats = tower, count, floats
        self._places = [(found.where, found.key) for found in look_ups]
        self.look_ups = nn.ModuleList(found.module for found in look_ups)

    def forward(
        self, ids: torch.Tensor, items: torch.Tensor | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        found: dict[str, dict[str, torch.Tensor]] = {"frozen": {}, "tables": {}}
        if self.history is not None:
            assert items is not None
            assert lengths is not None
            where, key, most = self._history_place
            found[where][key] = self.history.pooled(items, lengths, most=most)
        for (where, key), look_up in zip(self._places, self.look_ups, strict=True):
            found[where][key] = look_up(ids)
        if self.tower is None:
            return next(iter(found["frozen"].values()))
        floats = None if self.floats is None else self.floats(ids)
        count = None if self.count is None else self.count(ids)
        vectors, _ = self.tower(found["frozen"], found["tables"], floats, count)
        return vectors
