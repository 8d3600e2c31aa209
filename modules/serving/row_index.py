"""Ids -> rows of a table, by a map or directly, with a rule for unknown ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from recpress.modules.hashing.id_map import IdMap, universal_hash
from recpress.modules.hashing.map_buffers import MapSlot, pack, unpack
from recpress.modules.serving.tensors import Holder, LargeTensors, Stored

Formula = Literal["", "hash", "modulo", "quotient-remainder"]
"""How rows follow from an id, without a map."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class IndexPlan:
    """How ids become rows."""

    num_ids: int
    num_rows: int
    rows_per_id: int = 1
    seed: int = 0
    mapped: bool = False
    formula: Formula = ""
    remainders: int = 0
    """`quotient-remainder`: the divisor."""

    @classmethod
    def of(cls, num_ids: int, id_map: IdMap | None) -> IndexPlan:
        """The plan of a table whose ids have this map, or none."""
        if id_map is None:
            return cls(num_ids, num_ids)
        formula, remainders = _formula(id_map)
        return cls(id_map.num_ids, id_map.num_rows, id_map.rows_per_id, id_map.seed, True, formula, remainders)

    @property
    def needs_words(self) -> bool:
        return self.mapped and not self.formula

    @property
    def slot(self) -> MapSlot:
        bits = max(1, (self.num_rows - 1).bit_length())
        return MapSlot(self.num_ids, self.num_rows, self.rows_per_id, self.seed, 0, bits, -1)


def packed_words(id_map: IdMap, plan: IndexPlan) -> torch.Tensor:
    """The bit-packed rows of a map: int32."""
    return pack({id_map: plan.slot})


class RowIndex(Holder):
    """Ids (n,) int64 -> rows (n, rows_per_id) int64 and their weights (n, rows_per_id) float32, or None.

    An unknown id (negative, or not below `num_ids`) without a map gets the row `num_rows`, which holds the values for
    unknown ids. With a map it gets the rows of `IdMap.hashed` with weight 1, as in training.

    Args:
        words: `packed_words`, if the plan needs them.
        weights: (num_ids, rows_per_id) of the map, if it has weights.
    """

    def __init__(
        self, plan: IndexPlan, large: LargeTensors, words: Stored | None = None, weights: Stored | None = None
    ) -> None:
        super().__init__(large)
        self.plan, self.weighted = plan, weights is not None
        if words is not None:
            self.hold("words", words)
        if weights is not None:
            self.hold("weights", weights)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        plan = self.plan
        unknown = (ids < 0) | (ids >= plan.num_ids)
        if not plan.mapped:
            return torch.where(unknown, plan.num_rows, ids)[:, None], None
        known = torch.where(unknown, 0, ids)
        hashed = universal_hash(ids, plan.num_rows, plan.seed, plan.rows_per_id).long()
        rows = hashed if plan.formula == "hash" else torch.where(unknown[:, None], hashed, self._rows(known))
        if not self.weighted:
            return rows, None
        weights = self.held("weights")[known].float()
        return rows, torch.where(unknown[:, None], 1.0, weights)

    def _rows(self, known: torch.Tensor) -> torch.Tensor:
        plan = self.plan
        if plan.formula:
            return _by_formula(known, plan.formula, plan.num_rows, plan.remainders)
        count = plan.rows_per_id
        entries = known[:, None] * count + torch.arange(count, device=known.device)
        bit = entries.flatten() * plan.slot.bits + plan.slot.start
        return unpack(self.held("words"), bit, torch.tensor((1 << plan.slot.bits) - 1)).view(-1, count)


def _by_formula(ids: torch.Tensor, formula: Formula, num_rows: int, remainders: int) -> torch.Tensor:
    if formula == "modulo":
        return ids.remainder(num_rows)[:, None]
    quotient = torch.div(ids, remainders, rounding_mode="floor")
    return torch.stack([ids.remainder(remainders), quotient + remainders], 1)


def _formula(id_map: IdMap) -> tuple[Formula, int]:
    """The formula of a computed map, checked on all ids; "" if its rows must be stored."""
    if not id_map.computed or id_map.weights is not None or not id_map.num_ids:
        return "", 0
    formula: Formula = "hash"
    remainders = 0
    if id_map.method == "modulo":
        formula = "modulo"
    elif id_map.method == "quotient-remainder" and id_map.rows_per_id == 2:
        formula, remainders = "quotient-remainder", max(1, int(id_map.rows[0, 1]))
    for first in range(0, id_map.num_ids, _BLOCK):
        ids = torch.arange(first, min(first + _BLOCK, id_map.num_ids))
        if formula == "hash":
            found = id_map.hashed(ids).long()
        else:
            found = _by_formula(ids, formula, id_map.num_rows, remainders)
        if not torch.equal(found, id_map.rows[first : first + len(ids)].long()):
            return "", 0
    return formula, remainders
