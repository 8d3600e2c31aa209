"""Permutations that cost less than decoding.

A permutation is the order of random keys: random high bits, the place in the low ones. That is uniform, and the same
on every version of numpy (raw bits are stable, and a sort is a sort), but takes 40 ns a row; decoding takes 7 ns a
column. So a seed makes a few of them (`_base`), an epoch a few more by composing two of them, one rotated (1 ns a
row), and a use takes one of these and rotates it by a random amount (0.3 ns).

What that keeps: each row of a use goes to each place with the same probability, and two rows of different uses meet
with the probability that independent permutations would give. What it does not: the orders of many uses together are
not independent.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from recpress.data.sampling import philox

POOL = 4
"""Permutations of one size, at most."""
POOL_ROWS = 1 << 15
"""Rows of all permutations of one size together; of a larger one there is one."""


def members(rows: int) -> int:
    """How many permutations the pool has for `rows` rows."""
    return max(1, min(POOL, POOL_ROWS // _capacity(rows)))


def _capacity(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


class Pool:
    """Permutations that belong to a seed and an epoch. Safe to share between threads."""

    def __init__(self, seed: int, epoch: int) -> None:
        self._seed, self._epoch = seed, epoch
        self._whole: dict[tuple[int, int], np.ndarray] = {}
        # Each block asks for the same few: a thread that misses computes what another would.
        self._cached = lru_cache(maxsize=16 * POOL)(self._places)

    def permutation(self, rows: int, member: int) -> np.ndarray:
        """Place of each of `rows` rows. (rows,) int64"""
        size = _capacity(rows)
        if (size, member) not in self._whole:
            one, other, turn = philox("permutation", self._seed, self._epoch, size, member).random_raw(3).tolist()
            few = members(size)
            turned = np.roll(_base(self._seed, size, few + other % few), turn % size)
            self._whole[size, member] = _base(self._seed, size, one % few)[turned]
        whole = self._whole[size, member]
        return whole if rows == size else whole[whole < rows]  # of a uniform one also uniform

    def places(
        self, steps: int, width: int, extra: int, stride: int, member: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of rows that go to `width` neighbouring places in each of `steps` rows of a buffer, `stride` apart,
        and to `extra` in the next; without `member` in order.

        Returns: addresses (steps * width + extra,), and which of them are among the last `extra`. int64
        """
        return self._cached(steps, width, extra, stride, member)

    def _places(
        self, steps: int, width: int, extra: int, stride: int, member: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        grid = np.arange(steps)[:, None] * stride + np.arange(width)
        places = np.concatenate((grid.ravel(), steps * stride + np.arange(extra)))
        if member is not None:
            places = places[self.permutation(len(places), member)]
        return places, np.flatnonzero(places >= steps * stride) if extra else np.empty(0, dtype=np.int64)


@lru_cache(maxsize=4 * POOL)
def _base(seed: int, size: int, member: int) -> np.ndarray:
    """A uniform permutation of `size` rows, a power of two."""
    raw, low = philox("permutation", seed, size, member).random_raw(size), np.uint64(size - 1)
    return (np.sort(raw & ~low | np.arange(size, dtype=np.uint64)) & low).astype(np.int64)
