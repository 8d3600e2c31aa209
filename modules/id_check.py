"""Ids out of range, counted on the device of the batch: to raise in the forward, the host would wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class ChecksIds(nn.Module):
    """A module that may find out only later that a batch had an id out of range."""

    def check_ids(self) -> None:
        """Raise ValueError if a batch so far had an id out of range. Waits for the device."""
        raise NotImplementedError


def check_ids(model: nn.Module) -> None:
    """Raise ValueError if a batch so far had an id that a module of `model` rejects.

    On a CPU these modules raise in the forward. On CUDA that would make each step wait for the device, so call this
    where a loop waits anyway, such as where it logs the loss, and before saving a checkpoint. `recpress train` does.

    Example:
        >>> from recpress.modules import FrozenEmbeddingBagCollection, FrozenTable
        >>> check_ids(FrozenEmbeddingBagCollection([FrozenTable(name="t", rows=9, dim=4, features=("f",))]))
    """
    for module in model.modules():
        if isinstance(module, ChecksIds):
            module.check_ids()


def host_reads(tensor: torch.Tensor) -> bool:
    """Whether the host may read the numbers of a tensor: on a CPU, unless torch.compile or torch.export trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_traced(features: Any) -> bool:
    """Whether torch.fx, torch.export or torch.compile trace a forward with these features."""
    return isinstance(features, torch.fx.Proxy) or torch.compiler.is_compiling()


def require(condition: torch.Tensor, message: str) -> None:
    """Raise an error if `condition` () is false, in traced code. On CUDA that ends the process, as in torch."""
    if torch.jit.is_scripting():
        assert bool(condition), message  # TorchScript would drop the operator below, because nothing uses its result
    else:
        torch._assert_async(condition, message)


def per_id(numbers: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Repeat column k of (m, keys) `lengths[k]` times: (m, sum of lengths). One copy, without reading the device."""
    return torch.cat([numbers[:, k : k + 1].expand(-1, length) for k, length in enumerate(lengths)], 1)


class IdCheck:
    """Counts, on the device of the ids, those of some features that are out of range.

    Args:
        sizes: feature key -> its ids are 0 to size - 1.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self._counts = torch.zeros(len(self.sizes), dtype=torch.int64)
        self._first = torch.tensor([-1, 0])
        self._slots = torch.arange(len(self.sizes))
        self._limits: dict[tuple[tuple[str, ...], torch.device], torch.Tensor] = {}

    def out_of_range(self, ids: torch.Tensor, keys: Sequence[str], lengths: Sequence[int]) -> torch.Tensor:
        """Which ids are out of range, (n,) bool, false for features without a size. Counts them without waiting.

        During export it does not count: a program has no state.

        Args:
            ids: (n,), key by key.
            lengths: ids of each key.
        """
        limits = per_id(self._limits_of(tuple(keys), ids.device), lengths)[0]
        found = (limits >= 0) & ((ids < 0) | (ids >= limits))
        if len(lengths) and not torch.compiler.is_exporting() and len(ids):
            self._count(found, ids, keys, lengths)
        return found

    def _limits_of(self, keys: tuple[str, ...], device: torch.device) -> torch.Tensor:
        """(1, keys) int64; -1 for a feature without a size."""
        if torch.compiler.is_compiling():  # a tensor made while tracing must not outlive it
            return torch.tensor([[self.sizes.get(key, -1) for key in keys]], device=device)
        if (keys, device) not in self._limits:
            self._limits[keys, device] = torch.tensor([[self.sizes.get(key, -1) for key in keys]], device=device)
        return self._limits[keys, device]

    def _count(self, found: torch.Tensor, ids: torch.Tensor, keys: Sequence[str], lengths: Sequence[int]) -> None:
        if self._counts.device != ids.device:
            self._counts, self._first = self._counts.to(ids.device), self._first.to(ids.device)
            self._slots = self._slots.to(ids.device)
        running = F.pad(found.cumsum(0), (1, 0))  # before each id
        ends, places = [0, *accumulate(lengths)], [keys.index(key) for key in self.sizes]
        before = torch.cat([running[ends[p] : ends[p] + 1] for p in places])
        through = torch.cat([running[ends[p + 1] : ends[p + 1] + 1] for p in places])
        # Adds atomically, because a train pipeline and an evaluation use different CUDA streams.
        self._counts.index_add_(0, self._slots, through - before)
        first = found.to(torch.uint8).argmax(0, keepdim=True)
        key = ((before == 0) & (through > 0)).to(torch.uint8).argmax(0, keepdim=True)  # that has the first one
        new = (self._first[:1] < 0) & (running[-1:] > 0)
        self._first.copy_(torch.where(new, torch.cat([key, ids.index_select(0, first).long()]), self._first))

    def add(self, key_counts: torch.Tensor) -> None:
        """Add counts of the features, (features,), that the host knows."""
        self._counts += key_counts.to(self._counts.device)

    def counts(self) -> dict[str, int]:
        """Feature key -> its ids that were out of range, since construction or `reset`. Waits for the device."""
        return dict(zip(self.sizes, self._counts.tolist(), strict=True))

    def first(self) -> tuple[str, int] | None:
        """(feature key, id) of the first id that `out_of_range` found. Waits for the device."""
        key, found = self._first.tolist()
        return None if key < 0 else (list(self.sizes)[key], found)

    def reset(self) -> None:
        self._counts.zero_()
        self._first.copy_(torch.tensor([-1, 0]))
