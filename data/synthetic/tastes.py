"""The mathematics of the synthetic log: tastes, sampling without replacement by ordinal, a computed permutation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from recpress.data.config import SynthConfig
from recpress.data.seeds import generator


class Tastes:
    """The items of each user. `_order` has the items by taste, in each from the most to the least popular."""

    def __init__(self, config: SynthConfig) -> None:
        self.config = config
        tastes, items = config.tastes, config.items
        self._order = generator(config.seed, "items").permutation(items)
        self._starts = (np.arange(tastes + 1) * items) // tastes
        sizes = np.diff(self._starts)
        taste = np.repeat(np.arange(tastes), sizes)
        rank = np.arange(items) - self._starts[taste]
        weight = (rank + 1.0) ** -config.item_skew
        share = weight / np.add.reduceat(weight, self._starts[:-1])[taste]
        total = np.cumsum(share)
        before = total - share - (total[self._starts[:-1]] - share[self._starts[:-1]])[taste]  # C_h, in the taste
        self._before = np.clip(before, 0.0, 1.0)
        self._ends = taste + np.clip(before + share, 0.0, 1.0)  # ascending over all tastes
        # A draw of m items takes the h most popular for certain and the others in proportion to their share,
        # where h is the first that leaves no inclusion probability above 1: (m - h) share_h <= 1 - C_h.
        certain = np.minimum(rank + (1.0 - self._before) / (share * (1 + 1e-9)), 2.0 * sizes[taste])
        self._stride = 4.0 * int(sizes.max())
        self._certain = np.maximum.accumulate(taste * self._stride + certain)

        per_user = min(config.tastes_per_user, tastes)
        weights = config.taste_decay ** np.arange(per_user)
        self._weights = np.cumsum(weights) / weights.sum()
        self._most = int(sizes.min()) * 2 // 3  # items of one taste that one user meets
        self.most_rows = int(sizes.min()) * per_user // 3 - 1  # so the tastes' shares always find room
        popularity = (np.arange(tastes) + 1.0) ** -config.taste_skew
        self._main = np.cumsum(popularity) / popularity.sum()
        steps = [step for step in range(1, max(tastes, 2)) if math.gcd(step, tastes) == 1]
        self._steps = np.array(steps[:2] + steps[-2:])  # related tastes are neighbors on a ring

    def of_users(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Main taste and step of each user; the user's tastes are main, main + step, main + 2 step ... (mod
        tastes)."""
        main = np.searchsorted(self._main, uniform(users, self.config.seed, 1), side="right")
        step = self._steps[(uniform(users, self.config.seed, 2) * len(self._steps)).astype(np.int64)]
        return np.minimum(main, self.config.tastes - 1), step

    def of_items(self) -> np.ndarray:
        """Taste of each item."""
        taste = np.empty(self.config.items, dtype=np.int64)
        taste[self._order] = np.repeat(np.arange(self.config.tastes), np.diff(self._starts))
        return taste

    def items_of(self, users: np.ndarray, ordinals: np.ndarray, num: np.ndarray) -> np.ndarray:
        """The item at each ordinal, of users with `num` items in all; distinct for one user."""
        ends, end = [], np.zeros(len(users), dtype=np.int64)
        for weight in self._weights:  # the user's tastes in turn; the excess of a full one goes to the next
            end = np.minimum(end + self._most, np.rint(num * weight).astype(np.int64))
            ends.append(end)
        first, last, place = (
            np.zeros_like(end),
            end,
            np.zeros_like(end),
        )  # ordinals [first, last) are of this taste
        for end in ends:
            passed = ordinals >= end
            place += passed
            np.copyto(first, end, where=passed)
        for end in reversed(ends[:-1]):
            last = np.where(ordinals < end, end, last)
        main, step = self.of_users(users)
        taste = (main + place * step) % self.config.tastes
        drawn, ordinal = last - first, ordinals - first
        start = self._starts[taste]
        certain = search(self._certain, taste * self._stride + drawn, "left") - start
        before = self._before[start + np.minimum(certain, self._starts[taste + 1] - start - 1)]
        phase = uniform(users * self.config.tastes + taste, self.config.seed, 3)
        spacing = (1.0 - before) / np.maximum(drawn - certain, 1)
        quantile = before + (ordinal - certain + phase) * spacing
        found = search(self._ends, taste + quantile)
        found = np.clip(found, start + certain, self._starts[taste + 1] - 1)
        return self._order[np.where(ordinal < certain, start + ordinal, found)]


class Permutation:
    """A pseudo-random permutation of 0 .. size - 1 that is computed, not stored: a Feistel network, cycle
    walking."""

    def __init__(self, size: int, seed: int) -> None:
        bits = max((size - 1).bit_length(), 2)
        self._size = np.uint64(size)
        self._low = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = generator(seed, "permutation").integers(0, 2**64, 6, dtype=np.uint64) | np.uint64(1)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        places = self._once(places)
        while (outside := np.flatnonzero(places >= self._size)).size:
            places[outside] = self._once(places[outside])
        return places.astype(np.int64)

    def _once(self, places: np.ndarray) -> np.ndarray:
        high, low = places >> self._low, places & self._low_mask
        for key in self._keys.reshape(3, 2):
            high = high ^ (mix(low + key[0]) & self._high_mask)
            low = low ^ (mix(high + key[1]) & self._low_mask)
        return (high << self._low) | low


def mix(values: np.ndarray) -> np.ndarray:
    """Finalizer of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(ids: np.ndarray, seed: int, use: int) -> np.ndarray:
    """A number in [0, 1) per id and use."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + use * 0xD1B54A32D192ED03) % 2**64)
    with np.errstate(over="ignore"):
        return (mix(mix(ids.astype(np.uint64) + key)) >> np.uint64(11)) * 2.0**-53


def search(ends: np.ndarray, keys: np.ndarray, side: Literal["left", "right"] = "right") -> np.ndarray:
    """np.searchsorted; for a table larger than the cache, the keys are searched in sorted order."""
    if len(ends) < 1 << 16:
        return np.searchsorted(ends, keys, side=side)
    order = np.argsort(keys)
    found = np.empty(len(keys), dtype=np.int64)
    found[order] = np.searchsorted(ends, keys[order], side=side)
    return found
