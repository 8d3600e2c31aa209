"""The exact top K items of users, over the items of this rank.

A score is a float64 dot product rounded to float32, as in `evaluate`; equal scores are ordered by item id. So the
result does not depend on the device, the blocks or the world size. Almost all of the work is in float32, or in
bfloat16 on a CPU that multiplies it in hardware (AMX):

1. A block of scores (users x items) is one matrix product. Scores above a limit, the lowest score of the user's best
   candidates so far, are new candidates. Items with long vectors are first, so the limit is soon high, and new
   candidates are few. The search ends when no item is long enough.
2. The candidates, a few more than K, get their float64 scores.
3. The rounding error of the scores is bounded. If an item outside of the candidates could belong to the top K, the
   user is scored again in the next higher precision, and at last in float64 (for ties).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from recpress.trainer.evaluate.ranking import ItemShard
from recpress.trainer.model.vectors import VectorFn

COLUMNS = {"cpu": 8192, "cuda": 65_536}
"""Items of a block of scores, by type of the device."""
_GROUP = 16
_ROOM = 3
"""Room for new candidates, as a multiple of those that remain of them."""
_EXACT_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}
"""Memory for float64 vectors of candidates."""
_TRIES = 1024
"""Users after which the lower precision is given up if it did not suffice for a quarter of them."""
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
        self.k, self.threads = k, _threads(device)
        self.rows, columns = block or (_rows(device), COLUMNS[device.type])
        columns = min(columns, len(items.vectors))
        passes = [_Pass.of(items, columns, dtype) for dtype in _dtypes(device)]
        self._finders = [_Finder(items, k, self.rows, columns, passes) for _ in range(self.threads)]
        self._pool = ThreadPoolExecutor(self.threads, initializer=partial(torch.set_num_threads, 1))

    @staticmethod
    def nbytes(k: int, dim: int, items: int, device: torch.device) -> int:
        """Peak memory in bytes of one object and its calls, without the float32 vectors of `items` items."""
        rows, columns = _rows(device), COLUMNS[device.type]
        block = rows * min(columns, items) * 5
        candidates = rows * _width(k, device) * 12 * (3 * _ROOM + 4)
        again = 3 * max(_AGAIN_BYTES, 4 * items) + min(columns, items) * dim * 8
        low = sum(dtype.itemsize for dtype in _dtypes(device)[:-1]) * items * dim
        return low + _threads(device) * (block + candidates + 3 * _EXACT_BYTES[device.type] + again)

    def __call__(self, users: Tensor, lengths: np.ndarray, seen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The top K of each user, best first.

        Args:
            users: vectors (n, D) float32, finite, with finite scores.
            lengths, seen: (n,) number of items to omit of each user, and these items.

        Returns:
            (scores (n, K) float32, item ids (n, K) int64). Places without an item have the score -inf.
        """
        return self._in_blocks(_Finder.__call__, self._finders, users, lengths, seen)

    def among(self, users: Tensor, lengths: np.ndarray, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """As a call, but of the given items of each user, (lengths, items), those of this rank are the only ones."""
        return self._in_blocks(_Finder.among, self._finders[:1], users, lengths, items)

    def _in_blocks(
        self, find: Find, finders: list[_Finder], users: Tensor, lengths: np.ndarray, items: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """What `find` gives for blocks of users; each finder has a thread."""
        scores = users.new_full((len(users), self.k), -torch.inf)
        ids = torch.zeros(len(users), self.k, dtype=torch.int64, device=users.device)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        starts = iter(range(0, len(users), self.rows))  # shared by the threads; its `next` is atomic

        def work(finder: _Finder) -> None:
            for first in starts:
                last = min(first + self.rows, len(users))
                rows = np.repeat(np.arange(last - first), lengths[first:last])
                best = find(finder, users[first:last], rows, items[bounds[first] : bounds[last]])
                for all_users, found in zip((scores, ids), best, strict=True):
                    all_users[first:last, : found.shape[1]] = found

        if len(finders) == 1:
            work(finders[0])
        else:
            for done in [self._pool.submit(work, finder) for finder in finders]:
                done.result()
        return scores, ids


@dataclass(frozen=True)
class _Pass:
    """Item vectors in one precision."""

    dtype: torch.dtype
    blocks: list[Tensor]
    """(D, columns) each, by place."""
    largest: float
    """Norm of the longest item vector."""
    change: float
    """Norm of the largest change of an item vector by rounding it to this type."""

    @staticmethod
    def of(items: ItemsByNorm, columns: int, dtype: torch.dtype) -> _Pass:
        blocks, change = [], 0.0
        for first in range(0, items.count, columns):
            vectors = items.vectors[first : min(first + columns, items.count)]
            rounded = vectors.to(dtype)
            blocks.append(rounded.T if dtype == vectors.dtype else rounded.T.contiguous())
            change = max(change, float(_norms(vectors.double() - rounded.double()).max()))
        return _Pass(dtype, blocks, items.largest_norm, change)

    def error(self, users: Tensor, lowest: Tensor) -> Tensor:
        """By how much at most the score of an item exceeds its score in this pass, if that is at most `lowest`, (n,).

        The error of a dot product in float32 is at most D u / (1 - D u) |user| |item|, with u = 2**-24, in any order of
        addition (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). 8 more are for the norms.
        """
        terms = (users.shape[1] + 8) * 2.0**-24
        exact, rounded = users.double(), users.to(self.dtype).double()
        error = terms / (1 - terms) * _norms(rounded) * (self.largest + self.change)
        if self.dtype == torch.float32:
            return error
        error += _norms(exact - rounded) * (self.largest + self.change) + _norms(exact) * self.change
        return (1 + 2.0**-20) * error + 2.0**-8 * lowest.double().abs() + 1e-30  # the score is rounded too


class _Finder:
    """Finds the top K of one block of users at a time, in its own memory."""

    def __init__(self, items: ItemsByNorm, k: int, rows: int, columns: int, passes: list[_Pass]) -> None:
        device = items.vectors.device
        self.items, self.count, self.columns, self.passes = items, items.count, columns, passes
        self.k = min(k, self.count)
        self.width = min(_width(k, items.vectors.device), self.count)  # candidates
        self._scores = torch.empty(rows * self.columns, device=device)
        self._above = _Above(rows * self.columns, device)
        self._pending = _Pending(rows, _ROOM * self.width, device)
        self._tried = self._failed = 0

    @torch.no_grad()
    def __call__(self, users: Tensor, rows: np.ndarray, seen: np.ndarray) -> tuple[Tensor, Tensor]:
        """(scores, item ids), (n, K) each. Row rows[j] omits the item seen[j]."""
        if self.k == 0:
            return users.new_empty(len(users), 0), torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        here = (seen >= self.items.start) & (seen < self.items.stop)
        omitted = torch.from_numpy(np.stack([rows[here], seen[here] - self.items.start])).to(users.device)
        scores, ids, doubtful = self._best(users, omitted, self.passes[0])
        if len(self.passes) > 1:
            self._tried, self._failed = self._tried + len(users), self._failed + len(doubtful)
            if len(doubtful):
                some, of_some = doubtful, _of_rows(omitted, doubtful, len(users))
                scores[some], ids[some], doubtful = self._best(users[some], of_some, self.passes[1])
                doubtful = some[doubtful]
            if self._tried >= _TRIES and 4 * self._failed > self._tried:
                self.passes = self.passes[1:]
        step = max(1, _AGAIN_BYTES // (4 * self.count))
        for first in range(0, len(doubtful), step):
            some = doubtful[first : first + step]
            of_some = _of_rows(omitted, some, len(users))
            scores[some], ids[some] = self._again(users[some], of_some, scores[some, -1])
        return scores, ids

    @torch.no_grad()
    def among(self, users: Tensor, rows: np.ndarray, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """(scores, item ids), (n, up to K) each, of the pairs (row, item), by row, with an item of this rank."""
        here = (items >= self.items.start) & (items < self.items.stop)
        rows, items = rows[here], items[here] - self.items.start
        if not len(rows):
            return users.new_empty(len(users), 0), torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        counts = np.bincount(rows, minlength=len(users))
        columns = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        cells = torch.from_numpy(rows).to(users.device), torch.from_numpy(columns).to(users.device)
        approximate = users.new_full((len(users), int(counts.max())), -torch.inf)
        places = torch.zeros(approximate.shape, dtype=torch.int64, device=users.device)
        approximate[cells] = 0.0
        places[cells] = self.items.places[torch.from_numpy(items).to(users.device)].long()
        return self._exact(users, approximate, places)

    def _best(self, users: Tensor, omitted: Tensor, using: _Pass) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, item ids, rows for which they may be wrong)."""
        approximate, places = self._candidates(users, omitted, using)
        scores, ids = self._exact(users, approximate, places)
        if self.width == self.count:
            return scores, ids, ids.new_empty(0)
        last, lowest = scores[:, -1].double(), approximate.amin(1)  # no other item has a higher approximate score
        error = using.error(users, lowest) + 2.0**-23 * last.abs()  # a score just below `last` rounds to it
        certain = (last - lowest.double() > error) | (lowest == -torch.inf)
        return scores, ids, (~certain).nonzero()[:, 0]

    def _candidates(self, users: Tensor, omitted: Tensor, using: _Pass) -> tuple[Tensor, Tensor]:
        """(approximate scores (n, width) float32, places): no other item has a higher approximate score."""
        best = users.new_empty(len(users), 0)
        places = torch.empty(len(users), 0, dtype=torch.int64, device=users.device)
        limit = users.new_full((len(users),), -torch.inf)
        norms = users.norm(dim=1) * (1 + 2.0**-6)  # more than any rounding adds to a score
        rounded, buffer = users.to(using.dtype), self._scores.view(using.dtype)
        rows, omitted_places = omitted[0], self.items.places[omitted[1]].long()
        omitted_places, order = omitted_places.sort()
        rows = rows[order]
        starts = torch.arange(0, self.count + self.columns, self.columns, device=users.device)
        bounds = torch.searchsorted(omitted_places, starts).tolist()
        for number, first in enumerate(range(0, self.count, self.columns)):
            if first and bool((limit >= norms * self.items.norms[first]).all()):
                break  # by Cauchy-Schwarz, no further item is above the limit
            vectors = using.blocks[number]
            scores = buffer[: len(users) * vectors.shape[1]].view(len(users), -1)
            torch.mm(rounded, vectors, out=scores)
            of_block = slice(bounds[number], bounds[number + 1])
            scores[rows[of_block], omitted_places[of_block] - first] = -torch.inf
            if first == 0:
                limit = self._first_limit(scores)
            if self._pending.add(scores, self._above(scores, limit), first):
                continue
            best, places, limit = self._merged(best, places, *self._pending.take(len(users)), limit)
            if self._pending.add(scores, self._above(scores, limit), first):
                continue
            # Most of the block is above the limit.
            top = scores.float().topk(min(self.width, scores.shape[1]), sorted=False)
            best, places, limit = self._merged(best, places, top.values, top.indices + first, limit)
        best, places, _ = self._merged(best, places, *self._pending.take(len(users)), limit)
        missing = (0, self.width - best.shape[1])  # users who have seen almost all
        return pad(best, missing, value=-torch.inf), pad(places, missing)

    def _first_limit(self, scores: Tensor) -> Tensor:
        """A limit (n,) that at least `width` scores exceed: just below the width-th largest of the largest scores of
        groups. -inf if there are fewer groups."""
        groups = scores.shape[1] // _GROUP
        if groups < self.width:
            return torch.full((len(scores),), -torch.inf, device=scores.device)
        largest = scores[:, : groups * _GROUP].view(len(scores), _GROUP, groups).amax(1)
        lowest = largest.float().topk(self.width, sorted=False).values.amin(1).to(scores.dtype)
        return torch.nextafter(lowest, torch.full_like(lowest, -torch.inf)).float()

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

    def _again(self, users: Tensor, omitted: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, ids), (n, K) each, in float64 from the start. `limit`: at most the K-th best score, (n,)."""
        exact = users.double()
        scores = users.new_empty(len(users), self.count)  # by id
        for first in range(0, self.count, self.columns):
            vectors = self.items.vectors[first : min(first + self.columns, self.count)]
            ids = self.items.ids[first : first + len(vectors)] - self.items.start
            scores[:, ids] = (exact @ vectors.double().T).float()
        scores[omitted[0], omitted[1]] = -torch.inf
        best, best_ids = users.new_empty(len(users), self.k), omitted.new_empty(len(users), self.k)
        for row, of_row in enumerate(scores):
            above, tied = (of_row > limit[row]).nonzero()[:, 0], (of_row == limit[row]).nonzero()[:, 0]
            ids = torch.cat([above, tied[: self.k]]).sort().values
            ordered, order = of_row[ids].sort(descending=True, stable=True)
            best[row], best_ids[row] = ordered[: self.k], ids[order[: self.k]] + self.items.start
        return best, best_ids


class _Above:
    """Finds scores above a limit per row. numpy compares faster than torch, and skips a mask without hits faster."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._mask = np.empty(size, dtype=bool) if device.type == "cpu" else None

    def __call__(self, scores: Tensor, limit: Tensor) -> Tensor:
        """Flat places of the scores above the `limit` (n,), of the type of the scores, of their row, ascending."""
        limit = limit[:, None].to(scores.dtype)
        if self._mask is None:
            return (scores > limit).view(-1).nonzero()[:, 0]
        mask = self._mask[: scores.numel()].reshape(scores.shape)
        if scores.dtype == torch.float32:
            np.greater(scores.numpy(), limit.numpy(), out=mask)
        elif bool((limit >= 0).all()):  # the bits of positive numbers have their order, and negative ones are below
            np.greater(scores.view(torch.int16).numpy(), limit.view(torch.int16).numpy(), out=mask)
        else:
            torch.gt(scores, limit, out=torch.from_numpy(mask))
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
        self._scores.view(-1).scatter_(0, target, scores.view(-1).index_select(0, chosen).float())
        offset = rows[:-1] * columns - first
        self._places.view(-1).scatter_(0, target, chosen - offset.repeat_interleave(more, output_size=len(chosen)))
        self._counts[:size] = counts
        return True

    def take(self, rows: int) -> tuple[Tensor, Tensor]:
        """(scores, places), (rows, n) each, with -inf where a user has fewer than n. Empties it."""
        used = int(self._counts.max())
        scores, places = self._scores[:rows, :used].clone(), self._places[:rows, :used].clone()
        self._scores[:rows, :used] = -torch.inf
        self._counts.zero_()
        return scores, places


Find = Callable[[_Finder, Tensor, np.ndarray, np.ndarray], tuple[Tensor, Tensor]]
"""(finder, users (n, D), rows, items: pairs by row) -> (scores, item ids)."""


def _of_rows(pairs: Tensor, rows: Tensor, size: int) -> Tensor:
    """The pairs (row, item) (2, m) of these rows of `size`, which become rows 0, 1, ..."""
    place = torch.full((size,), -1, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    found = torch.stack([place[pairs[0]], pairs[1]])
    return found[:, found[0] >= 0]


def _norms(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=1)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """Precisions of approximate scores, in the order in which they are tried."""
    has_amx = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return [torch.bfloat16, torch.float32] if has_amx else [torch.float32]


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _rows(device: torch.device) -> int:
    """Users of a block of scores: on the CPU, a large block for each thread."""
    return min(512, max(64, 1024 // _threads(device))) if device.type == "cpu" else 1024


def _width(k: int, device: torch.device) -> int:
    """Number of candidates for K items: so many more that an item outside of them is seldom possible."""
    return k + (max(32, 2 * k // 5) if len(_dtypes(device)) > 1 else max(16, k // 8))
