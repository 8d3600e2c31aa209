"""Row numbers of maps, packed into as many bits as they need."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.layout import PlacedMap


def pack(maps: Mapping[IdMap, PlacedMap]) -> torch.Tensor:
    """Rows of all maps, `bits` bits each, one after the other from the lowest bit on, in int32 words.

    One word more than is filled, so that a number's second word always exists; of a map without ids, the first too.
    """
    total = sum(m.rows.numel() * m.bits for m in maps)
    words = np.zeros(-(-total // 32) + 1 + any(not m.rows.numel() for m in maps), np.uint32)
    for id_map, at in maps.items():
        flat = id_map.rows.reshape(-1)
        step = 32 << 15  # entries; a multiple of 32, so that only the map's first word is shared with what precedes
        for first in range(0, len(flat), step):
            values = flat[first : first + step].numpy().astype(np.uint64)
            position = at.start + (first + np.arange(len(values), dtype=np.int64)) * at.bits
            shifted = values << (position & 31).astype(np.uint64)
            word = position >> 5
            base, size = int(word[0]), int(word[-1]) - int(word[0]) + 2
            block = np.zeros(size, np.uint32)
            # Numbers of a word have no bit in common, so their sum is their union.
            for part, offset in ((shifted & 0xFFFFFFFF, 0), (shifted >> np.uint64(32), 1)):
                np.bitwise_or.at(block, word - base + offset, part.astype(np.uint32))
            words[base : base + size] |= block
    return torch.from_numpy(words.view(np.int32))


def decode(words: torch.Tensor, start: int, bits: int, entries: torch.Tensor) -> torch.Tensor:
    """Numbers (n,) int64 of `bits` <= 31 bits, from bit `start` on, at the places `entries`."""
    shift = entries.long() * bits + start
    word = shift >> 5
    shift &= 31
    high = words.index_select(0, word + 1).long()
    low = words.index_select(0, word).long()
    low &= 0xFFFFFFFF
    high <<= 32
    low |= high
    low >>= shift
    low &= (1 << bits) - 1
    return low
