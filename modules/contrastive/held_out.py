"""Interactions that early stopping holds out of the training."""

from __future__ import annotations

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.interactions import CSR

USERS = 3000
"""About as many users, over all ranks, have a held-out interaction."""
ITEMS = 2048
"""Sampled items that a held-out item is ranked among."""
TOP = 10


class HeldOut:
    """One interaction of some of this rank's users, and the other interactions as `train`.

    Args:
        by_user: all interactions of this rank's users.
        counts: interactions of every item, (num_items,).

    Its constructor and `ndcg` are collective.
    """

    def __init__(self, by_user: CSR, counts: np.ndarray, seed: int, exchange: Exchange) -> None:
        self.exchange, self.blocks = exchange, RowBlocks(len(counts), exchange.world)
        degrees = np.diff(by_user.indptr)
        able = np.flatnonzero(degrees >= 2)
        total = int(exchange.sum(torch.tensor(len(able), device=exchange.device)))
        rng = np.random.default_rng([seed % 2**32, 2, exchange.rank])
        self.users = able[rng.random(len(able)) < USERS / max(total, 1)]
        """Rows of the shard, ascending."""
        place = by_user.indptr[self.users] + (rng.random(len(self.users)) * degrees[self.users]).astype(np.int64)
        self.items = by_user.indices[place].astype(np.int64)
        kept = np.ones(len(by_user.indices), bool)
        kept[place] = False
        degrees[self.users] -= 1
        self.train = CSR(
            by_user.start,
            np.concatenate(([0], np.cumsum(degrees))),
            by_user.indices[kept],
            None if by_user.values is None else by_user.values[kept],
        )
        active = np.flatnonzero(counts)
        pool = np.random.default_rng([seed % 2**32, 3]).permutation(len(active))[:ITEMS]
        self._pool, self._times = np.sort(active[pool]), len(active) / max(len(pool), 1)
        self.rows = int(exchange.sum(torch.tensor(len(self.users), device=exchange.device)))
        """Held-out interactions of all ranks."""

    def ndcg(self, users: torch.Tensor, items: torch.Tensor) -> float:
        """Mean NDCG@10 of the held-out items, ranked by these vectors of this rank, (rows, d).

        The rank among all items is estimated from sampled ones; items of the user do not count.
        """
        ids, place = np.unique(np.concatenate([self._pool, self.items]), return_inverse=True)
        wanted = torch.from_numpy(ids).to(items.device)
        found = self.exchange.fetch_rows(items, wanted, self.blocks) if self.exchange.world > 1 else items[wanted]
        pool, target = (found[torch.from_numpy(part).to(items.device)] for part in np.split(place, [len(self._pool)]))
        total = 0.0
        for first in range(0, len(self.users), 256):
            rows = self.users[first : first + 256]
            vectors = users[torch.from_numpy(rows).to(users.device)]
            score = (vectors * target[first : first + 256]).sum(1, keepdim=True)
            ahead = (vectors @ pool.T >= score).cpu().numpy()
            ahead &= ~self._met(rows, self.items[first : first + 256])
            rank = ahead.sum(1) * self._times
            total += float(np.where(rank < TOP, 1 / np.log2(rank + 2), 0).sum())
        summed = self.exchange.sum(torch.tensor(total, dtype=torch.float64, device=self.exchange.device))
        return float(summed) / max(self.rows, 1)

    def _met(self, rows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Which sampled items the users have interacted with, (users, pool) bool."""
        found = self._pool == hidden[:, None]
        for k, row in enumerate(rows):
            found[k] |= np.isin(self._pool, self.train.indices[self.train.indptr[row] : self.train.indptr[row + 1]])
        return found
