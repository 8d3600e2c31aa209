"""The exact top K items of blocks of users, over the items of this rank.

A score is a float64 dot product rounded to float32, as in `evaluate`; equal scores are ordered by item id. So the
result does not depend on the device, the blocks or the world size. Almost all of the work is in float32:

1. A block of scores (users x items) is one matrix product. Its largest values, a group of columns at a time, are
   compared with the score that a user's item must exceed to be a candidate. Few groups pass; only those are compared
   item by item, and merged into the user's candidates.
2. The candidates, a few more than K, get their float64 scores.
3. The rounding error of float32 is bounded. If an item outside of the candidates could belong to the top K (it never
   does but for ties), the user is scored again in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recpress.trainer.evaluate.ranking import ItemShard

LANES = 16
"""Columns per group of a block of scores."""
COLUMNS = {"cpu": 4096, "cuda": 65_536}
"""Items of a block of scores, by type of the device; a multiple of LANES."""
_EXACT_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Memory for float64 vectors of candidates."""
_AGAIN = 16
"""Users that are scored again together."""


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
        rows: users of a block.
        columns: items of a block of scores, a multiple of LANES.
    """

    def __init__(self, shard: ItemShard, k: int, rows: int, columns: int | None = None) -> None:
        self.shard, self.rows = shard, rows
        self.count = shard.stop - shard.start
        self.k = min(k, self.count)
        self.width = min(k + max(16, k // 8), self.count)  # candidates
        device = shard.vectors.device
        self.columns = min(columns or COLUMNS[device.type], len(shard.vectors))
        self._scores = torch.empty(rows, self.columns, device=device)
        self._pending = _Pending(rows, 2 * self.width, device)

    @staticmethod
    def nbytes(k: int, rows: int, dim: int, items: int, device: torch.device) -> int:
        """Peak memory in bytes of one object and its calls, without the vectors of the shard of `items` items."""
        width, columns = k + max(16, k // 8), min(COLUMNS[device.type], -(-items // 4096) * 4096)
        block = rows * columns * 4
        groups = rows * columns // LANES
        first = rows * width * 24 * 4  # a block that fills all candidates
        exact = 3 * _EXACT_BYTES[device.type] + rows * dim * 8
        again = min(_AGAIN, rows) * columns * 40 + columns * dim * 8
        return block + 2 * groups * 5 + rows * width * 12 * 8 + first + exact + again

    @torch.no_grad()
    def __call__(self, users: Tensor, seen: Pairs) -> tuple[Tensor, Tensor]:
        """The top K of each user, best first.

        Args:
            users: vectors (rows, D) float32, finite, with finite scores.
            seen: items to omit.

        Returns:
            (scores (rows, K) float32, item ids (rows, K) int64). Places without an item have the score -inf.
        """
        if self.k == 0:
            return users.new_empty(len(users), 0), torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        approximate, places = self._candidates(users, seen)
        lowest = approximate.amin(1)
        scores, places = self._exact(users, approximate, places)
        if self.width < self.count:
            doubtful = self._doubtful(users, lowest, scores[:, -1])
            for first in range(0, len(doubtful), _AGAIN):
                rows = doubtful[first : first + _AGAIN]
                scores[rows], places[rows] = self._again(users[rows], seen.of_rows(rows, len(users)), scores[rows, -1])
        return scores, places + self.shard.start

    def _candidates(self, users: Tensor, seen: Pairs) -> tuple[Tensor, Tensor]:
        """(float32 scores (rows, width), places in the shard): no other item has a higher float32 score."""
        best = users.new_empty(len(users), 0)
        places = torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        limit = users.new_full((len(users),), -torch.inf)
        for first in range(0, self.count, self.columns):
            vectors = self.shard.vectors[first : first + self.columns]
            scores = self._scores[: len(users), : len(vectors)]
            torch.mm(users, vectors.T, out=scores)
            self._mask(scores, first, seen)
            if best.shape[1] == self.width:
                if self._pending.add(scores, first, limit):
                    continue
                best, places, limit = self._merged(best, places, *self._pending.take(len(users)))
                if self._pending.add(scores, first, limit):
                    continue
            top = scores.topk(min(self.width, len(vectors)), sorted=False)  # most of the block is a candidate
            best, places, limit = self._merged(best, places, top.values, top.indices + first)
        best, places, _ = self._merged(best, places, *self._pending.take(len(users)))
        return best, places

    def _mask(self, scores: Tensor, first: int, seen: Pairs) -> None:
        """Set the scores of seen items and of columns beyond the items to -inf."""
        scores[:, max(0, self.count - first) :] = -torch.inf
        start = self.shard.start + first
        pairs = seen.of_items(start, start + scores.shape[1])
        scores[pairs.rows, pairs.items - start] = -torch.inf

    def _merged(self, best: Tensor, places: Tensor, more: Tensor, more_places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, places, lowest score), each of the `width` best candidates or of all, if there are fewer."""
        best, places = torch.cat([best, more], 1), torch.cat([places, more_places], 1)
        if best.shape[1] > self.width:
            best, chosen = best.topk(self.width, sorted=False)
            places = places.gather(1, chosen)
        return best, places, best.amin(1)

    def _exact(self, users: Tensor, approximate: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The K best candidates by float64 scores, rounded to float32, and then by place: (rows, K) each."""
        places, order = places.sort(1)  # the sort by score is stable
        masked = approximate.gather(1, order) == -torch.inf
        scores = torch.empty_like(approximate)
        size = max(1, _EXACT_BYTES[users.device.type] // (8 * self.shard.dim * places.shape[1]))
        for first in range(0, len(users), size):
            rows = slice(first, first + size)
            vectors = self.shard.vectors[places[rows]].double()  # (size, width, D)
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


class _Pending:
    """Candidates of each user that were found since the last merge."""

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        self._scores = torch.full((rows, room), -torch.inf, device=device)
        self._places = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, first: int, limit: Tensor) -> bool:
        """Add what is above the `limit` of its row; False, and nothing is added, if there is no room for it.

        Args:
            scores: (rows, columns) of the places from `first` on.
        """
        size, columns = scores.shape
        lanes = scores.view(size, LANES, columns // LANES)  # a group has every (columns / LANES)-th column
        rows, groups = (lanes.amax(1) > limit[:, None]).nonzero(as_tuple=True)
        if len(rows) > size * self._scores.shape[1]:
            return False
        values = lanes[rows, :, groups]
        hits, lane = (values > limit[rows, None]).nonzero(as_tuple=True)
        rows, found = rows[hits], values[hits, lane]
        places = first + lane * (columns // LANES) + groups[hits]
        more = torch.bincount(rows, minlength=size)
        counts = self._counts[:size] + more
        if int(counts.max()) > self._scores.shape[1]:
            return False
        column = self._counts[rows] + torch.arange(len(rows), device=rows.device) - (more.cumsum(0) - more)[rows]
        self._scores[rows, column] = found
        self._places[rows, column] = places
        self._counts[:size] = counts
        return True

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """(scores, places), (rows, n) each, with -inf where a user has fewer than n. Empties it."""
        used = int(self._counts.max())
        scores, places = self._scores[:rows, :used].clone(), self._places[:rows, :used].clone()
        self._scores[:rows, :used] = -torch.inf
        self._counts.zero_()
        return scores, places


def sorted_pairs(rows: np.ndarray, items: np.ndarray, device: torch.device) -> Pairs:
    """Pairs of arrays, (n,) each."""
    order = np.argsort(items, kind="stable")
    return Pairs(
        torch.from_numpy(rows[order].astype(np.int64)).to(device),
        torch.from_numpy(items[order].astype(np.int64)).to(device),
    )
