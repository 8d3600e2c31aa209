"""The pairs of a log as a set, so that a drawn negative is known not to be a positive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.errors import InputError
from recpress.data.negatives.table import distinct
from recpress.data.sampling.scan import iter_columns

_SLOTS = 1 << 16
"""Slots of the filter that `InteractionSet.among` makes of the low bits of the items: small enough for a cache."""


AT_ONCE = 1 << 21
"""Pairs to search, or negatives to redraw, at once on a GPU: 16 MiB for each intermediate tensor."""


class InteractionSet:
    """The set of (user, item) pairs of a log, to look pairs up in. About 10 bytes a pair, on each rank.

    Args:
        keys: sorted int64, user * num_items + item.
    """

    def __init__(self, keys: torch.Tensor, num_items: int) -> None:
        self.keys, self.num_items = keys, num_items
        self._filter = _BitFilter(keys) if keys.device.type == "cpu" and len(keys) else None

    @classmethod
    def of_pairs(cls, users: np.ndarray, items: np.ndarray, num_items: int) -> InteractionSet:
        """Of int64 arrays of pairs, in any order, with repetitions."""
        return cls(torch.from_numpy(distinct(_keys(users, items, num_items))), num_items)

    @classmethod
    def of(cls, parts: Sequence[ParquetSplit], user: str, item: str, num_items: int) -> InteractionSet:
        """Of parts of a log, read in a stream. `user` and `item` are the names of the columns."""
        keys = [np.empty(0, dtype=np.int64)]
        for rows in parts:
            for data in iter_columns(rows, [user, item]):
                users, items = data[user], data[item]
                assert isinstance(users, np.ndarray)
                assert isinstance(items, np.ndarray)
                keys.append(_keys(users, items, num_items))
        return cls(torch.from_numpy(distinct(np.concatenate(keys))), num_items)

    def to(self, device: torch.device | str) -> InteractionSet:
        return InteractionSet(self.keys.to(device), self.num_items)

    def __len__(self) -> int:
        return len(self.keys)

    def contains(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Whether each pair is in the set; users and items broadcast. Bool, of the broadcast shape."""
        pairs = users * self.num_items + items
        if not len(self.keys):
            return torch.zeros_like(pairs, dtype=torch.bool)
        if self._filter is None:
            return self._search(pairs)
        maybe = self._filter.maybe(pairs)
        found = maybe.nonzero(as_tuple=True)
        maybe[found] = self._search(pairs[found])
        return maybe

    def among(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Whether each user has each item: users (B,), items (N,) -> bool (B, N).

        On a CPU it goes over the users' own items, not over all B * N pairs. How many there are depends on the data, so
        on CUDA, where the host would wait for that number, it searches for each pair. Takes no memory that grows with
        `num_items`.
        """
        if not on_host(users):
            step = max(1, AT_ONCE // max(1, len(items)))
            return torch.cat([self.contains(part[:, None], items) for part in users.split(step)])
        users, row = torch.unique(users, return_inverse=True)  # active users have many rows of a batch
        if not len(items):
            return torch.zeros(len(row), 0, dtype=torch.bool, device=row.device)
        distinct, column = torch.unique(items, return_inverse=True)
        base = users * self.num_items
        starts = torch.searchsorted(self.keys, base)
        lengths = torch.searchsorted(self.keys, base + self.num_items) - starts
        first = lengths.cumsum(0) - lengths
        owner = torch.repeat_interleave(lengths)
        place = torch.arange(len(owner), device=users.device).add_((starts - first)[owner])
        own = self.keys[place].sub_(base[owner])
        low_bits = torch.zeros(_SLOTS, dtype=torch.bool, device=items.device)
        low_bits[distinct & (_SLOTS - 1)] = True
        maybe = low_bits[own & (_SLOTS - 1)].nonzero().squeeze(1)
        owner, own = owner[maybe], own[maybe]
        found = torch.searchsorted(distinct, own)
        # An item above all of `distinct` is found beyond its end.
        known = (distinct[found.clamp_(max=len(distinct) - 1)] == own).nonzero().squeeze(1)
        has = torch.zeros(len(users) * len(distinct), dtype=torch.bool, device=users.device)
        has[owner[known] * len(distinct) + found[known]] = True
        return has.view(len(users), len(distinct)).index_select(1, column).index_select(0, row)

    def _search(self, pairs: torch.Tensor) -> torch.Tensor:
        at = torch.searchsorted(self.keys, pairs).clamp_(max=len(self.keys) - 1)
        return self.keys[at] == pairs


class _BitFilter:
    """One bit for each of at least 8 times as many slots as keys (a Bloom filter of one hash, Bloom 1970). On
    a CPU one look settles most lookups, where a binary search misses the cache at every halving."""

    def __init__(self, keys: torch.Tensor) -> None:
        self._mask = (1 << (8 * len(keys) - 1).bit_length()) - 1
        slots = np.zeros(self._mask + 1, dtype=bool)
        slots[self._slot(keys).numpy()] = True
        self._bytes = torch.from_numpy(np.packbits(slots, bitorder="little"))

    def maybe(self, keys: torch.Tensor) -> torch.Tensor:
        """False if a key surely is not there. Bool, of the shape of keys."""
        slot = self._slot(keys)
        return (self._bytes[slot >> 3] >> (slot & 7)) & 1 == 1

    def _slot(self, keys: torch.Tensor) -> torch.Tensor:
        return mix(keys) & self._mask


def _keys(users: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    if len(users) and int(users.max()) >= (2**63 - 1) // num_items:
        raise InputError(f"pairs of {int(users.max()) + 1} users and {num_items} items do not fit in 63 bits")
    return users * np.int64(num_items) + items


def on_host(tensor: torch.Tensor) -> bool:
    """Whether sizes may depend on the numbers of the tensor: on a GPU the host would wait for them."""
    return tensor.device.type == "cpu"


def mix(bits: torch.Tensor) -> torch.Tensor:
    """Hash of int64 to 64 bits: the finalizer of splitmix64."""
    bits = (bits ^ shift(bits, 30)) * signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ shift(bits, 27)) * signed(0x94D049BB133111EB)
    return bits ^ shift(bits, 31)


def signed(bits: int) -> int:
    """The low 64 bits as an int64."""
    bits &= 2**64 - 1
    return bits - 2**64 if bits >= 2**63 else bits


def shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right of int64."""
    return (bits >> by) & (2 ** (64 - by) - 1)
