"""The exact top K items of users, over the items of this rank.

A score is a float64 dot product rounded to float32, as in `evaluate`; equal scores are ordered by item id. So the
result does not depend on the device, the blocks or the world size. Almost all of the work is in float32:

1. A block of scores (users x items) is one matrix product. Scores above a limit, the lowest score of the user's best
   candidates so far, are new candidates. Items with long vectors are first, so the limit is soon high, and new
   candidates are few. The search ends when no item is long enough.
2. The candidates, a few more than K, get their float64 scores.
3. The rounding error of float32 is bounded. If an item outside of the candidates could belong to the top K (it never
   does but for ties), the user is scored again in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recpress.trainer.evaluate.ranking import ItemShard
from recpress.trainer.model.vectors import VectorFn

BLOCK = {"cpu": (128, 8192), "cuda": (1024, 65_536)}
"""Users and items of a block of scores, by type of the device. On the CPU a block stays in the cache of a core."""
_GROUP = 16
_ROOM = 3
"""Room for new candidates, as a multiple of those that remain of them."""
_EXACT_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Memory for float64 vectors of candidates."""
_AGAIN_BYTES = 1 << 24
"""Memory for the scores of users that are scored again."""


class ItemsByNorm(ItemShard):
    """The item vectors of this rank, by falling norm."""

    def __init__(self, item_vectors: VectorFn, num_items: int, item_chunk: int, device: torch.device) -> None:
        super().__init__(item_vectors, num_items, item_chunk, device)
        self.count = self.stop - self.start
        norms = torch.cat([part.double().norm(dim=1).float() for part in self.vectors.split(item_chunk)])[: self.count]
        self.norms, order = norms.sort(descending=True, stable=True)
        self.ids = order + self.start
        """Item of each place, (count,) int64."""
        self.places = torch.empty(self.count, dtype=torch.int32, device=device)
        """Place of each item from `start` on, (count,) int32."""
        self.places[order] = torch.arange(self.count, dtype=torch.int32, device=device)
        with torch.no_grad():  # the vectors again, because a sorted copy would take twice their memory
            for first in range(0, len(self.vectors), item_chunk):
                ids = torch.arange(self.start + first, self.start + first + item_chunk, device=device)
                part = item_vectors(ids.clamp_(max=num_items - 1)).detach().to(device, torch.float32)
                places = self.places[first : first + item_chunk].long()
                self.vectors[places] = part[: len(places)]

    @staticmethod
    def nbytes(items: int, dim: int) -> int:
        """Memory of the vectors of this many items, and of their order."""
        return items * (4 * dim + 32)


class TopItems:
    """Finds the top K among the items of a rank, on the CPU with as many threads as torch has.

    Args:
        items: of this rank.
        k: items per user.
        block: users and items of a block of scores.
    """

    def __init__(self, items: ItemsByNorm, k: int, block: tuple[int, int] | None = None) -> None:
        device = items.vectors.device
        self.k, (self.rows, columns) = k, block or BLOCK[device.type]
        self.threads = _threads(device)
        self._finders = [_Finder(items, k, self.rows, columns) for _ in range(self.threads)]
        self._pool = ThreadPoolExecutor(self.threads, initializer=partial(torch.set_num_threads, 1))

    @staticmethod
    def nbytes(k: int, dim: int, items: int, device: torch.device) -> int:
        """Peak memory in bytes of one object and its calls, without the vectors of `items` items."""
        rows, columns = BLOCK[device.type]
        block = rows * min(columns, items) * 5
        candidates = rows * _width(k) * 12 * (3 * _ROOM + 4)
        again = 8 * max(_AGAIN_BYTES, 4 * items) + min(columns, items) * dim * 8
        return _threads(device) * (block + candidates + 3 * _EXACT_BYTES[device.type] + again)

    def __call__(self, users: Tensor, lengths: np.ndarray, seen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The top K of each user, best first.

        Args:
            users: vectors (n, D) float32, finite, with finite scores.
            lengths, seen: (n,) number of items to omit of each user, and these items.

        Returns:
            (scores (n, K) float32, item ids (n, K) int64). Places without an item have the score -inf.
        """
        scores = users.new_full((len(users), self.k), -torch.inf)
        items = torch.zeros(len(users), self.k, dtype=torch.int64, device=users.device)
        bounds = np.concatenate([[0], np.cumsum(lengths)])

        def find(finder: _Finder, blocks: Iterator[int]) -> None:
            for first in blocks:
                last = min(first + self.rows, len(users))
                rows = np.repeat(np.arange(last - first), lengths[first:last])
                best = finder(users[first:last], rows, seen[bounds[first] : bounds[last]])
                for all_users, found in zip((scores, items), best, strict=True):
                    all_users[first:last, : found.shape[1]] = found

        starts = range(0, len(users), self.rows)
        if self.threads == 1:
            find(self._finders[0], iter(starts))
        else:
            shared = iter(starts)  # `next` of a range iterator is atomic
            for done in [self._pool.submit(find, finder, shared) for finder in self._finders]:
                done.result()
        return scores, items


class _Finder:
    """Finds the top K of one block of users at a time, in its own memory."""

    def __init__(self, items: ItemsByNorm, k: int, rows: int, columns: int) -> None:
        device = items.vectors.device
        self.items, self.count = items, items.count
        self.k = min(k, self.count)
        self.width = min(_width(k), self.count)  # candidates
        self.columns = min(columns, len(items.vectors))
        self._scores = torch.empty(rows * self.columns, device=device)
        self._above = _Above(rows * self.columns, device)
        self._pending = _Pending(rows, _ROOM * self.width, device)

    @torch.no_grad()
    def __call__(self, users: Tensor, rows: np.ndarray, seen: np.ndarray) -> tuple[Tensor, Tensor]:
        """(scores, item ids), (n, K) each. Row rows[j] omits the item seen[j]."""
        if self.k == 0:
            return users.new_empty(len(users), 0), torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        here = (seen >= self.items.start) & (seen < self.items.stop)
        omitted = torch.from_numpy(np.stack([rows[here], seen[here] - self.items.start])).to(users.device)
        approximate, places = self._candidates(users, omitted)
        lowest = approximate.amin(1)
        scores, ids = self._exact(users, approximate, places)
        if self.width < self.count:
            doubtful = self._doubtful(users, lowest, scores[:, -1])
            step = max(1, _AGAIN_BYTES // (4 * self.count))
            for first in range(0, len(doubtful), step):
                again = doubtful[first : first + step]
                scores[again], ids[again] = self._again(users, again, omitted, scores[again, -1])
        return scores, ids

    def _candidates(self, users: Tensor, omitted: Tensor) -> tuple[Tensor, Tensor]:
        """(float32 scores (n, width), places): no other item has a higher float32 score."""
        best = users.new_empty(len(users), 0)
        places = torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        limit = users.new_full((len(users),), -torch.inf)
        norms = users.norm(dim=1) * (1 + 1e-5)  # of float32, rounded up
        rows, omitted_places = omitted[0], self.items.places[omitted[1]].long()
        omitted_places, order = omitted_places.sort()
        rows = rows[order]
        starts = torch.arange(0, self.count + self.columns, self.columns, device=users.device)
        bounds = torch.searchsorted(omitted_places, starts).tolist()
        for number, first in enumerate(range(0, self.count, self.columns)):
            if first and bool((limit >= norms * self.items.norms[first]).all()):
                break  # by Cauchy-Schwarz, no further item is above the limit
            vectors = self.items.vectors[first : min(first + self.columns, self.count)]
            scores = self._scores[: len(users) * len(vectors)].view(len(users), len(vectors))
            torch.mm(users, vectors.T, out=scores)
            of_block = slice(bounds[number], bounds[number + 1])
            scores[rows[of_block], omitted_places[of_block] - first] = -torch.inf
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
        """The K best candidates by float64 scores, rounded to float32, and then by id: (scores, ids), (n, K) each."""
        ids, order = self.items.ids[places].sort(1)  # the sort by score is stable
        places = places.gather(1, order)
        masked = approximate.gather(1, order) == -torch.inf
        scores = torch.empty_like(approximate)
        size = max(1, _EXACT_BYTES[users.device.type] // (8 * self.items.dim * places.shape[1]))
        for first in range(0, len(users), size):
            rows = slice(first, first + size)
            vectors = self.items.vectors.index_select(0, places[rows].reshape(-1)).double()
            vectors = vectors.view(-1, places.shape[1], self.items.dim)
            scores[rows] = torch.bmm(vectors, users[rows, :, None].double())[:, :, 0].float()
        scores[masked] = -torch.inf
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, : self.k].contiguous(), ids.gather(1, order[:, : self.k])

    def _doubtful(self, users: Tensor, lowest: Tensor, last: Tensor) -> Tensor:
        """Rows of users with a possible item outside of the candidates: none of those has a float32 score above
        `lowest`, and the K-th candidate has the score `last`."""
        # |float32 score - score| <= D u / (1 - D u) |user| |item|, with u = 2**-24, in any order of addition (Higham,
        # Accuracy and Stability of Numerical Algorithms, 3.1); 8 more for the float64 scores and the norms.
        bound = (self.items.dim + 8) * 2.0**-24
        error = bound / (1 - bound) * users.double().norm(dim=1) * self.items.largest_norm
        error += 2.0**-23 * last.double().abs()  # a score just below `last` rounds to it
        certain = (last.double() - lowest.double() > error) | (lowest == -torch.inf)
        return (~certain).nonzero()[:, 0]

    def _again(self, users: Tensor, again: Tensor, omitted: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, ids), (len(again), K) each, of these rows, in float64 from the start.

        Args:
            limit: at most the K-th best score, (len(again),).
        """
        exact = users[again].double()
        scores = users.new_empty(len(again), self.count)  # by id
        for first in range(0, self.count, self.columns):
            vectors = self.items.vectors[first : min(first + self.columns, self.count)]
            ids = self.items.ids[first : first + len(vectors)] - self.items.start
            scores[:, ids] = (exact @ vectors.double().T).float()
        row_of = torch.full((len(users),), -1, device=users.device)
        row_of[again] = torch.arange(len(again), device=users.device)
        rows = row_of[omitted[0]]
        scores[rows[rows >= 0], omitted[1][rows >= 0]] = -torch.inf
        best, best_ids = users.new_empty(len(again), self.k), again.new_empty(len(again), self.k)
        for row, of_row in enumerate(scores):
            above, tied = (of_row > limit[row]).nonzero()[:, 0], (of_row == limit[row]).nonzero()[:, 0]
            ids = torch.cat([above, tied[: self.k]]).sort().values
            ordered, order = of_row[ids].sort(descending=True, stable=True)
            best[row], best_ids[row] = ordered[: self.k], ids[order[: self.k]] + self.items.start
        return best, best_ids


class _Above:
    """Finds scores above a limit per row. numpy skips a mask without hits faster than torch does."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._mask = np.empty(size, dtype=bool) if device.type == "cpu" else None

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
        (size, columns), room = scores.shape, self._scores.shape[1]
        if len(chosen) > size * room:
            return False
        rows = torch.arange(size + 1, device=chosen.device)
        bounds = torch.searchsorted(chosen, rows * columns)
        more = bounds.diff()
        counts = self._counts[:size] + more
        if int(counts.max()) > room:
            return False
        start = rows[:-1] * room + self._counts[:size] - bounds[:-1]
        target = start.repeat_interleave(more, output_size=len(chosen))
        target += torch.arange(len(chosen), device=chosen.device)
        self._scores.view(-1)[target] = scores.view(-1)[chosen]
        offset = rows[:-1] * columns - first
        self._places.view(-1)[target] = chosen - offset.repeat_interleave(more, output_size=len(chosen))
        self._counts[:size] = counts
        return True

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """(scores, places), (rows, n) each, with -inf where a user has fewer than n. Empties it."""
        used = int(self._counts.max())
        scores, places = self._scores[:rows, :used].clone(), self._places[:rows, :used].clone()
        self._scores[:rows, :used] = -torch.inf
        self._counts.zero_()
        return scores, places


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _width(k: int) -> int:
    """Number of candidates for K items."""
    return k + max(16, k // 8)
