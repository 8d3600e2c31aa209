"""How `LearnedHash` stores its maps: all rows in one buffer, bit-packed on request, and where each map starts in it.

One buffer for all maps, so that one kernel looks up the ids of all features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.hashing.id_map import IdMap, hash_offset, universal_hash


@dataclass(frozen=True)
class MapSlot:
    """One IdMap and its position in the buffers."""

    num_ids: int
    num_rows: int
    rows_per_id: int
    seed: int
    start: int
    """First entry in `rows`, or first bit in the packed words."""
    bits: int
    weight_start: int
    """First entry in `weights`; -1 if the map has none."""

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (n, rows_per_id) int32 of ids that the map does not cover."""
        return universal_hash(ids, self.num_rows, self.seed, self.rows_per_id)


def pack(maps: Mapping[IdMap, MapSlot]) -> torch.Tensor:
    """The rows of all maps as consecutive numbers of `bits` bits, lowest bit first, in int32 words.

    There is one more word than the numbers fill, so that the second word of every number exists, and one more if a
    map has no ids.
    """
    total = sum(m.rows.numel() * m.bits for m in maps)
    words = np.zeros(-(-total // 32) + 1 + any(not m.rows.numel() for m in maps), np.uint32)
    for id_map, slot in maps.items():
        flat = id_map.rows.reshape(-1)
        step = 32 << 15  # a multiple of 32 numbers, so that only the first word is shared with the map before
        for first in range(0, len(flat), step):
            values = flat[first : first + step].numpy().astype(np.uint64)
            position = slot.start + (first + np.arange(len(values), dtype=np.int64)) * slot.bits
            shifted = values << (position & 31).astype(np.uint64)
            word = position >> 5
            base, size = int(word[0]), int(word[-1]) - int(word[0]) + 2
            block = np.zeros(size, np.uint32)
            for half, offset in ((shifted & 0xFFFFFFFF, 0), (shifted >> np.uint64(32), 1)):
                np.bitwise_or.at(block, word - base + offset, half.astype(np.uint32))
            words[base : base + size] |= block
    return torch.from_numpy(words.view(np.int32))


def unpack(words: torch.Tensor, bit: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The numbers of a packed map that start at `bit` (n,) int64: (n,) int64. A number has at most 31 bits.

    Args:
        mask: 2**bits - 1 as int64, of all numbers () or of each (n,).
    """
    word = bit >> 5
    shift = bit & 31
    high = words.index_select(0, word + 1).long()
    low = words.index_select(0, word).long()
    low &= 0xFFFFFFFF
    high <<= 32
    low |= high
    low >>= shift
    low &= mask
    return low


class BatchLayout:
    """What depends only on the order of a batch's keys, computed once for each order."""

    def __init__(self, keys: list[str], slots: Mapping[str, MapSlot], packed: bool) -> None:
        maps = [slots.get(key) for key in keys]
        self.keys = list(keys)
        self.rows_per_id = [1 if m is None else m.rows_per_id for m in maps]
        self.max_rows_per_id = max(self.rows_per_id)
        self.positions = [keys.index(key) for key in slots]
        self.num_ids = [None if m is None else m.num_ids for m in maps]
        self.weighted = any(m is not None and m.weight_start >= 0 for m in maps)
        columns = [(m, column) for m, count in zip(maps, self.rows_per_id, strict=True) for column in range(count)]
        self._constants = {
            "entries": list(zip(*(column_numbers(m, column, packed) for m, column in columns), strict=True)),
            "rows per id": [self.rows_per_id],
        }
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.runs = _runs(maps)

    def entry_lengths(self, lengths: list[int]) -> list[int]:
        """Entries of each key, of its number of ids."""
        return [length * count for length, count in zip(lengths, self.rows_per_id, strict=True)]

    def entries(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Positions in the rows of their maps, `rows_per_id` for each id."""
        parts = [
            (part[:, None] * count + torch.arange(count, device=ids.device, dtype=ids.dtype)).reshape(-1)
            for part, count in self._parts(ids, lengths)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def repeat(self, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """One value per id -> one per entry."""
        if self.max_rows_per_id == 1:
            return values
        parts = [part[:, None].expand(-1, count).reshape(-1) for part, count in self._parts(values, lengths)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, values: torch.Tensor, lengths: list[int]) -> list[tuple[torch.Tensor, int]]:
        """Parts in which all ids have the same number of rows."""
        if min(self.rows_per_id) == self.max_rows_per_id:
            return [(values, self.max_rows_per_id)]
        return list(zip(values.split(lengths), self.rows_per_id, strict=True))

    def numbers(self, lengths: list[int], device: torch.device) -> torch.Tensor:
        """`column_numbers` of each entry of a batch with `lengths[k]` ids of key k: (9, entries) int64.

        Nothing is read from the device.
        """
        table = self._tensor("entries", device)
        parts, at = [], 0
        for count, length in zip(self.rows_per_id, lengths, strict=True):
            of_key = table[:, None, at : at + count]
            parts.append(of_key.expand(-1, length, -1).reshape(len(table), length * count))
            at += count
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def key_rows_per_id(self, device: torch.device) -> torch.Tensor:
        """`rows_per_id` as (1, keys) int64."""
        return self._tensor("rows per id", device)

    def _tensor(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self._tensors:
            self._tensors[name, device] = torch.tensor(self._constants[name], device=device)
        return self._tensors[name, device]


def column_numbers(slot: MapSlot | None, column: int, packed: bool) -> list[int]:
    """What `map_ids.map_entries` must know of one column of a map, or of a feature without a map."""
    if slot is None:
        return [-1, 0, 0, 0, 1, 0, -1, 1, 0]
    size = slot.bits if packed else 1
    return [
        slot.start,  # in `rows`, or in the bits of the packed words
        size * slot.rows_per_id,  # entries, or bits, of an id
        size * column,  # before this column
        (1 << slot.bits) - 1,
        slot.num_rows,
        hash_offset(slot.seed, column),
        slot.weight_start,
        slot.rows_per_id,
        column,
    ]


def _runs(maps: list[MapSlot | None]) -> list[tuple[int, torch.Tensor]]:
    """Split the keys into runs for fbgemm's `pruned_array_lookup`: (end of the run, where each map starts).

    The operator reads feature t's map from starts[t], and copies its ids if starts[t + 1] is not larger. So the starts
    must ascend within a run; a map that two features share begins a new run.
    """
    runs: list[tuple[int, torch.Tensor]] = []
    starts: list[int] = []
    end = 0  # of the last map in this run
    for index, slot in enumerate(maps):
        if slot is None:
            starts.append(end)
            continue
        if starts and slot.start < end:
            runs.append((index, torch.tensor([*starts, end])))
            starts, end = [], 0
        # Features without a map right before this one start where it starts, so that their range is empty.
        for back in range(len(starts) - 1, -1, -1):
            if starts[back] != end:
                break
            starts[back] = slot.start
        starts.append(slot.start)
        end = slot.start + slot.num_ids * slot.rows_per_id
    runs.append((len(maps), torch.tensor([*starts, end])))
    return runs
