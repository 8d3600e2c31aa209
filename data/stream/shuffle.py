"""Permutations that cost less than decoding.

A permutation is the order of random keys: random high bits, the place in the low ones. That is uniform, and the same
on every version of numpy (raw bits are stable, and a sort is a sort), but takes 40 ns a row; decoding takes 7 ns a
column. So a seed makes a few of them (`_base`), an epoch a few more by composing two of them, one rotated (1 ns a
row), and a use takes one of these and rotates the places by a random amount, which costs nothing.

What that keeps: each row of a use goes to each place with the same probability, and two rows of different uses meet
with the probability that independent permutations would give. What it does not: the orders of many uses together are
not independent; rows at the same two places of two uses of one permutation end as far apart in both.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from recpress.data.seeds import philox

POOL = 4
"""Permutations of one size, at most."""
POOL_ROWS = 1 << 17
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
        # Each block asks for the same few: a thread that misses computes what another would.
        self._whole: dict[tuple[int, int], np.ndarray] = {}
        self._inverse: dict[tuple[int, int], np.ndarray] = {}
        self._cached = lru_cache(maxsize=16)(_grid)

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

    def sources(self, rows: int, member: int, turn: int) -> np.ndarray:
        """Which row goes to each place, where row k goes to place (permutation[k] + turn) mod rows. (rows,) int64,
        not to be written to."""
        if (rows, member) not in self._inverse:
            inverse = np.empty(rows, dtype=np.int64)
            inverse[self.permutation(rows, member)] = np.arange(rows)
            self._inverse[rows, member] = np.concatenate((inverse, inverse))  # of which any turn is a part
        return self._inverse[rows, member][rows - turn : 2 * rows - turn]

    def grid(self, steps: int, width: int, extra: int, stride: int) -> np.ndarray:
        """Addresses of `width` neighbouring places in each of `steps` rows of a buffer, `stride` apart, and of `extra`
        in the next. (steps * width + extra,) int64, not to be written to."""
        return self._cached(steps, width, extra, stride)


def _grid(steps: int, width: int, extra: int, stride: int) -> np.ndarray:
    places = np.arange(steps)[:, None] * stride + np.arange(width)
    return np.concatenate((places.ravel(), steps * stride + np.arange(extra)))


@lru_cache(maxsize=4 * POOL)
def _base(seed: int, size: int, member: int) -> np.ndarray:
    """A uniform permutation of `size` rows, a power of two."""
    raw, low = philox("permutation", seed, size, member).random_raw(size), np.uint64(size - 1)
    return (np.sort(raw & ~low | np.arange(size, dtype=np.uint64)) & low).astype(np.int64)
