"""Block sampling: whole row groups at random, so that only the row groups drawn are read.

Every row is in the sample with the same probability, whatever the sizes of the row groups, and the sample has exactly
round(rate * N) of the N rows, of which at most one row group is taken in part. Row groups are drawn by the pivotal
method (Deville, Tillé 1998, "Unequal probability sampling without replacement through a splitting method"), in a
random order and with sizes: two row groups that are each to give a share of their rows settle it by a coin, so that one
of them gives all it has or nothing and the expectation of both stays; the other goes on to the next. With row groups of
equal size this is drawing them at random without replacement.

Rows of one row group come together or not at all, so what is alike within row groups (a log in the order of time or of
users) is estimated worse than from as many single rows: see `recpress.data.sampling.design_effect`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recpress.data.seeds import philox


class BlockSample:
    """The members of a block sample of row groups of the given sizes. Memory: 16 bytes a row group."""

    def __init__(self, sizes: Sequence[int], rate: float, seed: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._seed = seed
        self.counts = drawn(self._sizes.tolist(), rate, seed)
        """Members of each row group. (groups,) int64"""

    def members(self, group: int) -> np.ndarray | None:
        """Sorted int64 rows of a row group, or None for all of them."""
        count, size = int(self.counts[group]), int(self._sizes[group])
        if count == size:
            return None
        if count == 0:
            return np.empty(0, dtype=np.int64)
        keys = philox("block rows", self._seed).random_raw(size)
        return np.sort(np.argpartition(keys, count - 1)[:count]).astype(np.int64)


def drawn(sizes: Sequence[int], rate: float, seed: int) -> np.ndarray:
    """Rows that each row group gives: all, none, or of one of them a part. (groups,) int64, in sum round(rate * N)."""
    total = sum(sizes)
    take = round(rate * total)
    found = np.zeros(len(sizes), dtype=np.int64)
    if not sizes:
        return found
    bits = philox("block", seed)
    order = np.argsort(bits.random_raw(len(sizes)), kind="stable").tolist()
    coins = bits.random_raw(len(sizes)).tolist()
    # In units of 1 / total rows everything is an integer, and nothing is rounded.
    current, share = order[0], sizes[order[0]] * take
    for following, coin in zip(order[1:], coins, strict=False):
        both = share + sizes[following] * take
        most = min(sizes[current] * total, both)
        least = max(0, both - sizes[following] * total)
        settled = most if coin * (most - least) < (share - least) << 64 else least
        if settled in (0, sizes[current] * total):
            found[current] = settled // total
            current, share = following, both - settled
        else:
            found[following] = (both - settled) // total
            share = settled
    found[current] = share // total
    return found
