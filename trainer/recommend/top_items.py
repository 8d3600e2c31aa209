"""The exact top K items of blocks of users, over the items of this rank.

A score is a float64 dot product rounded to float32, as in `evaluate`; equal scores are ordered by item id. So the
result does not depend on the device, the blocks or the world size. Almost all of the work is in float32:

1. A block of scores (users x items) is one matrix product. Scores above a limit, the lowest score of the user's best
   candidates so far, are new candidates: few after the first blocks.
2. The candidates, a few more than K, get their float64 scores.
3. The rounding error of float32 is bounded. If an item outside of the candidates could belong to the top K (it never
   does but for ties), the user is scored again in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recpress.trainer.evaluate.ranking import ItemShard

BLOCK = {"cpu": (256, 8192), "cuda": (1024, 65_536)}
"""Users and items of a block of scores, by type of the device. On the CPU it stays in the cache."""
_GROUP = 16
_ROOM = 3
"""Room for new candidates, as a multiple of those that remain of them."""
_EXACT_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Memory for float64 vectors of candidates."""
_AGAIN = 16
"""Users that are scored again together."""
_FEW_THREADS = 4
"""Up to as many threads, one thread of numpy finds the scores above a limit sooner than those of torch."""


class Pairs(NamedTuple):
    """Pairs (row of a block of users, item), sorted by item."""

    rows: Tensor
    items: Tensor

    def of_items(self, start: int, stop: int) -> Pairs:
        """The pairs with an item in [start, stop)."""
        first, last = torch.searchsorted(self.items, torch.tensor([start, stop], device=self.items.device)).tolist()
        return Pairs(self.rows[first:last], self.items[first:last])

    def of_rows(self, rows: Tensor, size: int) -> Pairs:
        """The pairs of these rows of `size`, which become rows 0, 1, ..."""
        place = torch.full((size,), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        here = place[self.rows]
        return Pairs(here[here >= 0], self.items[here >= 0])


class TopItems:
    """Finds the top K among the items of a shard.

    Args:
        shard: the item vectors of this rank.
        k: items per user; fewer are found if the shard has fewer.
        block: users and items of a block of scores.
    """

    def __init__(self, shard: ItemShard, k: int, block: tuple[int, int] | None = None) -> None:
        device = shard.vectors.device
        self.shard = shard
        self.count = shard.stop - shard.start
        self.k = min(k, self.count)
        self.width = min(_width(k), self.count)  # candidates
        self.rows, columns = block or BLOCK[device.type]
        self.columns = min(columns, len(shard.vectors))
        self._scores = torch.empty(self.rows * self.columns, device=device)
        self._above = _Above(self.rows * self.columns, device)
        self._pending = _Pending(self.rows, _ROOM * self.width, device)

    @staticmethod
    def nbytes(k: int, dim: int, items: int, device: torch.device) -> int:
        """Peak memory in bytes of one object and its calls, without the vectors of the shard of `items` items."""
        rows, columns = BLOCK[device.type]
        columns = min(columns, items)
        candidates = rows * _width(k) * 12 * (3 * _ROOM + 4)
        again = _AGAIN * columns * 40 + columns * dim * 8
        return rows * columns * 5 + candidates + 3 * _EXACT_BYTES[device.type] + again

    @torch.no_grad()
    def __call__(self, users: Tensor, seen: Pairs) -> tuple[Tensor, Tensor]:
        """The top K of each user, best first.

        Args:
            users: vectors (n, D) float32, finite, with finite scores.
            seen: items to omit.

        Returns:
            (scores (n, K) float32, item ids (n, K) int64). Places without an item have the score -inf.
        """
        scores = users.new_full((len(users), self.k), -torch.inf)
        items = torch.zeros(len(users), self.k, dtype=torch.int64, device=users.device)
        if self.k == 0:
            return scores, items
        for first in range(0, len(users), self.rows):
            rows = torch.arange(first, min(first + self.rows, len(users)), device=users.device)
            scores[rows], items[rows] = self._block(users[rows], seen.of_rows(rows, len(users)))
        return scores, items + self.shard.start

    def _block(self, users: Tensor, seen: Pairs) -> tuple[Tensor, Tensor]:
        approximate, places = self._candidates(users, seen)
        lowest = approximate.amin(1)
        scores, places = self._exact(users, approximate, places)
        if self.width < self.count:
            doubtful = self._doubtful(users, lowest, scores[:, -1])
            for first in range(0, len(doubtful), _AGAIN):
                rows = doubtful[first : first + _AGAIN]
                scores[rows], places[rows] = self._again(users[rows], seen.of_rows(rows, len(users)), scores[rows, -1])
        return scores, places

    def _candidates(self, users: Tensor, seen: Pairs) -> tuple[Tensor, Tensor]:
        """(float32 scores (n, width), places in the shard): no other item has a higher float32 score."""
        best = users.new_empty(len(users), 0)
        places = torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        limit = users.new_full((len(users),), -torch.inf)
        for first in range(0, self.count, self.columns):
            vectors = self.shard.vectors[first : first + self.columns]
            scores = self._scores[: len(users) * len(vectors)].view(len(users), len(vectors))
            torch.mm(users, vectors.T, out=scores)
            self._mask(scores, first, seen)
            if first == 0:
                limit = self._first_limit(scores)
            if self._pending.add(scores, self._above(scores, limit), first):
                continue
            best, places, limit = self._merged(best, places, *self._pending.take(len(users)), limit)
            if self._pending.add(scores, self._above(scores, limit), first):
                continue
            top = scores.topk(min(self.width, len(vectors)), sorted=False)  # most of the block is above the limit
            best, places, limit = self._merged(best, places, top.values, top.indices + first, limit)
        best, places, _ = self._merged(best, places, *self._pending.take(len(users)), limit)
        missing = (0, self.width - best.shape[1])  # users who have seen almost all
        return pad(best, missing, value=-torch.inf), pad(places, missing)

    def _first_limit(self, scores: Tensor) -> Tensor:
        """A limit (n,) that at least `width` scores exceed: just below the width-th largest of the largest scores of
        groups. -inf if there are fewer groups."""
        groups = scores.shape[1] // _GROUP
        if groups < self.width:
            return scores.new_full((len(scores),), -torch.inf)
        largest = scores[:, : groups * _GROUP].view(len(scores), _GROUP, groups).amax(1)
        lowest = largest.topk(self.width, sorted=False).values.amin(1)
        return torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))

    def _mask(self, scores: Tensor, first: int, seen: Pairs) -> None:
        """Set the scores of seen items and of columns beyond the items to -inf."""
        scores[:, max(0, self.count - first) :] = -torch.inf
        start = self.shard.start + first
        pairs = seen.of_items(start, start + scores.shape[1])
        scores[pairs.rows, pairs.items - start] = -torch.inf

    def _merged(
        self, best: Tensor, places: Tensor, more: Tensor, more_places: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, places, limit): the `width` best candidates, or all if there are fewer, and their lowest score."""
        best, places = torch.cat([best, more], 1), torch.cat([places, more_places], 1)
        if best.shape[1] > self.width:
            best, chosen = best.topk(self.width, sorted=False)
            places = places.gather(1, chosen)
        return best, places, torch.maximum(limit, best.amin(1)) if best.shape[1] == self.width else limit

    def _exact(self, users: Tensor, approximate: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The K best candidates by float64 scores, rounded to float32, and then by place: (rows, K) each."""
        places, order = places.sort(1)  # the sort by score is stable
        masked = approximate.gather(1, order) == -torch.inf
        scores = torch.empty_like(approximate)
        size = max(1, _EXACT_BYTES[users.device.type] // (8 * self.shard.dim * places.shape[1]))
        for first in range(0, len(users), size):
            rows = slice(first, first + size)
            vectors = self.shard.vectors.index_select(0, places[rows].reshape(-1)).double()
            vectors = vectors.view(-1, places.shape[1], self.shard.dim)
            scores[rows] = torch.bmm(vectors, users[rows, :, None].double())[:, :, 0].float()
        scores[masked] = -torch.inf
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, : self.k].contiguous(), places.gather(1, order[:, : self.k])

    def _doubtful(self, users: Tensor, lowest: Tensor, last: Tensor) -> Tensor:
        """Rows of users with a possible item outside of the candidates: none of those has a float32 score above
        `lowest`, and the K-th candidate has the score `last`."""
        # |float32 score - score| <= D u / (1 - D u) |user| |item|, with u = 2**-24, in any order of addition (Higham,
        # Accuracy and Stability of Numerical Algorithms, 3.1); 8 more for the float64 scores and the norms.
        bound = (self.shard.dim + 8) * 2.0**-24
        error = bound / (1 - bound) * users.double().norm(dim=1) * self.shard.largest_norm
        error += 2.0**-23 * last.double().abs()  # a score just below `last` rounds to it
        certain = (last.double() - lowest.double() > error) | (lowest == -torch.inf)
        return (~certain).nonzero()[:, 0]

    def _again(self, users: Tensor, seen: Pairs, limit: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, places), (n, K) each, in float64 from the start. `limit` is at most the K-th best score."""
        exact = users.double()
        ties = torch.zeros(len(users), dtype=torch.int64, device=users.device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, self.count, self.columns):
            scores = (exact @ self.shard.vectors[first : first + self.columns].double().T).float()
            self._mask(scores, first, seen)
            tied = scores == limit[:, None]
            tied &= tied.cumsum(1) <= (self.k - ties)[:, None]  # the first ones, by id
            ties += tied.sum(1)
            rows, columns = (tied | (scores > limit[:, None])).nonzero(as_tuple=True)
            found.append((rows, columns + first, scores[rows, columns]))
        rows, places, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        best, best_places = users.new_empty(len(users), self.k), ties.new_empty(len(users), self.k)
        for row in range(len(users)):
            mine = rows == row
            ordered, order = values[mine].sort(descending=True, stable=True)  # `mine` is by rising place
            best[row], best_places[row] = ordered[: self.k], places[mine][order[: self.k]]
        return best, best_places


class _Above:
    """Finds scores above a limit per row."""

    def __init__(self, size: int, device: torch.device) -> None:
        few = device.type == "cpu" and torch.get_num_threads() <= _FEW_THREADS
        self._mask = np.empty(size, dtype=bool) if few else None

    def __call__(self, scores: Tensor, limit: Tensor) -> Tensor:
        """Flat places of the scores above the `limit` of their row, ascending."""
        if self._mask is None:
            return (scores > limit[:, None]).view(-1).nonzero()[:, 0]
        mask = self._mask[: scores.numel()]
        np.greater(scores.numpy(), limit.numpy()[:, None], out=mask.reshape(scores.shape))
        return torch.from_numpy(np.flatnonzero(mask))


class _Pending:
    """Candidates of each user that were found since the last merge."""

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        self._scores = torch.full((rows, room), -torch.inf, device=device)
        self._places = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, chosen: Tensor, first: int) -> bool:
        """Add some scores; False, and nothing is added, if there is no room for them.

        Args:
            scores: (n, columns) of the places from `first` on.
            chosen: flat places in `scores`, ascending.
        """
        size, columns = scores.shape
        if len(chosen) > size * self._scores.shape[1]:
            return False
        rows = chosen // columns
        more = torch.bincount(rows, minlength=size)
        counts = self._counts[:size] + more
        if int(counts.max()) > self._scores.shape[1]:
            return False
        start = rows * self._scores.shape[1] + (self._counts[:size] - more.cumsum(0) + more)[rows]
        target = start + torch.arange(len(rows), device=rows.device)
        self._scores.view(-1)[target] = scores.view(-1)[chosen]
        self._places.view(-1)[target] = chosen - rows * columns + first
        self._counts[:size] = counts
        return True

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """(scores, places), (rows, n) each, with -inf where a user has fewer than n. Empties it."""
        used = int(self._counts.max())
        scores, places = self._scores[:rows, :used].clone(), self._places[:rows, :used].clone()
        self._scores[:rows, :used] = -torch.inf
        self._counts.zero_()
        return scores, places


def _width(k: int) -> int:
    """Number of candidates for K items."""
    return k + max(16, k // 8)


def sorted_pairs(rows: np.ndarray, items: np.ndarray, device: torch.device) -> Pairs:
    """Pairs of arrays, (n,) each."""
    order = np.argsort(items, kind="stable")
    return Pairs(
        torch.from_numpy(rows[order].astype(np.int64)).to(device),
        torch.from_numpy(items[order].astype(np.int64)).to(device),
    )
