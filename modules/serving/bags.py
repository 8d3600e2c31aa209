"""Served tables, and the collection that takes the place of TorchRec's EmbeddingBagCollection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from recpress.modules.serving.row_index import RowIndex
from recpress.modules.serving.rows import ServedRows


class ServedTable(nn.Module):
    """One table: ids -> vectors.

    Args:
        mean: pool by the mean of the rows, as TorchRec: behind a map with two rows per id, over both.
        dim: of the vectors; less than that of the rows if these are padded. Default: of the rows.
    """

    def __init__(self, index: RowIndex, rows: ServedRows, *, mean: bool = False, dim: int | None = None) -> None:
        super().__init__()
        self.index, self.rows, self.mean, self.dim = index, rows, mean, dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The vector of each id (n,) -> (n, dim) float32."""
        rows, weights = self.index(ids)
        count = rows.shape[1]
        if count == 1 and weights is None:
            return self.rows(rows[:, 0])[:, : self.dim]
        parts = [self.rows(rows[:, k])[:, : self.dim] for k in range(count)]
        if weights is not None:
            parts = [part * weights[:, k : k + 1] for k, part in enumerate(parts)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / count if self.mean else total

    def pooled(
        self, ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None, most: int = 0
    ) -> torch.Tensor:
        """The pooled vector of each list: ids (n,), lengths (B,) -> (B, dim) float32; NaN if a length is negative or
        the lengths do not add up to n.

        Args:
            weights: (n,), of the ids.
            most: only the last `most` ids of a list count; 0: all.
        """
        batch, count = lengths.shape[0], ids.shape[0]
        lengths, place = lengths.long(), torch.arange(count, device=ids.device)
        ends = lengths.cumsum(0)
        # Not repeat_interleave, which writes beyond its output if lengths add up to more. `batch`: beyond the lists.
        bags = torch.searchsorted(ends, place, right=True)
        vectors = self(ids)
        if weights is not None:
            vectors = vectors * weights[:, None]
        if most:
            from_end = nn.functional.pad(ends, (0, 1))[bags] - place
            vectors = vectors * (from_end <= most)[:, None]
        total = vectors.new_zeros(batch + 1, vectors.shape[1]).index_add(0, bags, vectors)[:batch]
        fits = (lengths >= 0).all() & (lengths.sum() == count)
        total = torch.where(fits, total, torch.nan)
        if not self.mean:
            return total
        divisor = lengths.clamp(min=1, max=most) if most else lengths.clamp(min=1)
        return total / divisor[:, None]


@dataclass(frozen=True)
class BagOutput:
    """One output of a collection."""

    key: str
    """`feature`, or `feature@table` if several tables share it, as in TorchRec."""
    feature: str
    table: str
    single: bool
    """Each row of a batch has exactly one id."""
    most: int = 0
    """Only the last so many ids of a list count; 0: all."""


class ServedBags(nn.Module):
    """KeyedJaggedTensor -> KeyedTensor, as an EmbeddingBagCollection of these tables."""

    def __init__(
        self,
        tables: Mapping[str, ServedTable],
        outputs: Sequence[BagOutput],
        dims: Mapping[str, int],
        *,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        self._index = {name: place for place, name in enumerate(tables)}  # table names may have dots
        self.tables = nn.ModuleList(tables.values())
        self.outputs, self.weighted = list(outputs), weighted
        self._keys = [output.key for output in outputs]
        self._dims = [dims[output.table] for output in outputs]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        values = []
        for output in self.outputs:
            table, bags = self._table(output.table), _bags(features, output.feature)
            weights = bags.weights_or_none() if self.weighted else None
            if output.single and weights is None:
                values.append(table(bags.values()))
            else:
                values.append(table.pooled(bags.values(), bags.lengths(), weights, output.most))
        return KeyedTensor(self._keys, self._dims, torch.cat(values, 1))

    def _table(self, name: str) -> ServedTable:
        table = self.tables[self._index[name]]
        assert isinstance(table, ServedTable)
        return table


def remember_parts(features: KeyedJaggedTensor, parts: Mapping[str, JaggedTensor]) -> None:
    """Let `ServedBags` take the features of `parts` from there, and not out of the joined values.

    Joining and cutting costs time, and the tracer of torch.export loses track of sizes that add up.
    """
    setattr(features, _PARTS, parts)


_PARTS = "_served_parts"


def _bags(features: KeyedJaggedTensor, key: str) -> JaggedTensor:
    parts: Mapping[str, JaggedTensor] = getattr(features, _PARTS, {})
    return parts[key] if key in parts else features[key]
