"""Any model of batches for serving: columns of a log -> predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec import JaggedTensor, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from recpress.modules.serving.bags import remember_parts
from recpress.modules.serving.tensors import Holder, LargeTensors, Stored
from recpress.modules.serving.tower import PerId


class PerIdLists(Holder):
    """Lists of numbers of an id: ids (n,) -> (values, lengths (n,)). An unknown id has an empty list.

    Args:
        values, offsets: all lists; offsets are (num_ids + 2,), the last list is empty.
    """

    def __init__(self, values: Stored, offsets: Stored, large: LargeTensors) -> None:
        super().__init__(large)
        self.num_ids = offsets.tensor.shape[0] - 2
        self.hold("values", values)
        self.hold("offsets", offsets)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = torch.where((ids < 0) | (ids >= self.num_ids), self.num_ids, ids)
        offsets = self.held("offsets")
        starts = offsets[known]
        lengths = offsets[known + 1] - starts
        ends = lengths.cumsum(0)
        total: Any = lengths.sum().item()  # int() would need the number while tracing
        torch._check(total >= 0)
        shift = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=total)
        return self.held("values")[shift + torch.arange(total, device=ids.device)].long(), lengths


@dataclass(frozen=True)
class ServedColumn:
    """One feature of the batch."""

    name: str
    columns: tuple[str, ...]
    """Of the program's inputs: one, or the values and the lengths of lists."""
    of_id: nn.Module | None = None
    """`PerId` or `PerIdLists`, if the feature is one of the id in the column."""
    number: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Transform or buckets of a number."""
    is_float: bool = False
    """It is a column of `dense_features`, and no key of `sparse_features`."""


class ServedModel(nn.Module):
    """Columns -> predictions (B,), by a model that maps a TorchRec `Batch` to (loss, predictions).

    Args:
        inputs: names of the tensors of a call: numbers and ids (B,), values and lengths of lists.
    """

    def __init__(self, model: nn.Module, columns: Sequence[ServedColumn], inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.columns, self.inputs = model, list(columns), list(inputs)
        self.of_ids = nn.ModuleList(column.of_id for column in columns if column.of_id is not None)

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self.inputs, given, strict=True))
        size = _batch_size(inputs, self.columns)
        keys, values, lengths, floats = [], [], [], []
        for column in self.columns:
            found, of_lists = _column(column, inputs)
            if column.is_float:
                floats.append(found)
                continue
            keys.append(column.name)
            values.append(found)
            lengths.append(torch.ones_like(found) if of_lists is None else of_lists.long())
        labels = torch.zeros(size, device=given[0].device)
        counts = [part.shape[0] for part in values]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        features = KeyedJaggedTensor(
            keys,
            torch.cat(values),
            lengths=torch.cat(lengths),
            stride=size,
            length_per_key=counts,
            offset_per_key=offsets,
        )
        parts = zip(keys, values, lengths, strict=True)
        remember_parts(features, {key: JaggedTensor(value, lengths=of_key) for key, value, of_key in parts})
        dense = torch.stack(floats, 1) if floats else labels.new_zeros(size, 0)
        _, predictions = self.model(Batch(dense_features=dense, sparse_features=features, labels=labels))
        return predictions.float()


def _batch_size(inputs: Mapping[str, torch.Tensor], columns: Sequence[ServedColumn]) -> int:
    return inputs[columns[0].columns[-1]].shape[0]  # lengths, not values, have a row each


def _column(column: ServedColumn, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values, lengths of lists or None)."""
    found, lengths = inputs[column.columns[0]], None
    if isinstance(column.of_id, PerId):
        found = column.of_id(found)
    elif column.of_id is not None:
        found, lengths = column.of_id(found)
    elif len(column.columns) == 2:
        lengths = inputs[column.columns[1]]
    if column.number is not None:
        found = column.number(found)
    return (found if column.is_float else found.long()), lengths
