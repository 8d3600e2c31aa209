"""Columns of ids -> a KeyedJaggedTensor, with one key per column."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recpress.data.dataset.side_table import JaggedColumn


class KeyedFeatures:
    """Builds KeyedJaggedTensors of ids, (B,) int64 each, and of lists of ids.

    Lengths and offsets of batches without lists are made once for each shape: they cost more than the rest. Nothing is
    read back from the device. Safe to share between threads.

    Args:
        device: of the ids.

    Example:
        >>> features = KeyedFeatures()({"user": torch.tensor([3, 1]), "item": torch.tensor([7, 7])}, 2)
        >>> features.keys(), features.lengths().tolist()
        (['user', 'item'], [1, 1, 1, 1])
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._shapes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, columns: Mapping[str, torch.Tensor | JaggedColumn], stride: int) -> KeyedJaggedTensor:
        """Keys in the order of the columns, `stride` rows each."""
        parts = list(columns.values())
        values = [part.values if isinstance(part, JaggedColumn) else part for part in parts]
        if not any(isinstance(part, JaggedColumn) for part in parts):
            lengths, offsets = self.ones(len(parts), stride)
        else:
            one, _ = self.ones(1, stride)
            lengths = torch.cat([part.lengths if isinstance(part, JaggedColumn) else one for part in parts])
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return KeyedJaggedTensor(
            keys=list(columns),
            values=torch.cat(values) if len(values) > 1 else values[0],
            lengths=lengths,
            offsets=offsets,
            stride=stride,
            length_per_key=[len(part) for part in values],
        )

    def ones(self, keys: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths (keys * stride,) and offsets of a batch with one id per row and key."""
        found = self._shapes.get((keys, stride))  # once: another thread may clear it
        if found is None:
            if len(self._shapes) > 16:  # sizes of all kinds, as an evaluation may have
                self._shapes.clear()
            lengths = torch.ones(keys * stride, dtype=torch.int64, device=self._device)
            found = self._shapes[keys, stride] = lengths, torch.arange(keys * stride + 1, device=self._device)
        return found
