"""Batches of users with all their positives and shared negatives, cut out of a CSR on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recpress.modules.als.interactions import CSR


@dataclass
class Batch:
    """Users with their positives, and the distinct items that they need. All of one rank."""

    users: np.ndarray
    """Rows of the shard, distinct, (B,) int64."""
    items: np.ndarray
    """Distinct ids of positives and negatives, ascending, (k,) int64."""
    indptr: np.ndarray
    """Positives of each user, (B + 1,) int64."""
    row: np.ndarray
    """User of each positive as a row of the batch, (P,) int64."""
    positive: np.ndarray
    """Place in `items` of each positive, (P,) int64."""
    weight: np.ndarray
    """Of each positive, (P,) float32."""
    negative: np.ndarray
    """Place in `items` of each negative, (n,) int64."""
    log_expected: np.ndarray
    """log(n pi_j) of each negative, (n,) float32."""
    by_item: np.ndarray
    """The positives in the order of `items`, (P,) int64."""
    item_indptr: np.ndarray
    """Positives of each of the items, (k + 1,) int64."""


class NegativeSampler:
    """Draws items with probabilities in proportion to count ** exponent.

    The draws are stratified: draw j falls into the j-th of n equal parts of the distribution. That keeps the expected
    number of draws of every item and lowers the variance of sums over them.

    Args:
        counts: interactions of each item, (num_items,). An item without any is never drawn.
        unbiased: a sum over the draws divided by their expected numbers estimates the sum over all items; otherwise
            it estimates the sum weighted by the probabilities.
    """

    def __init__(self, counts: np.ndarray, exponent: float, *, unbiased: bool = True) -> None:
        weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** exponent, 0.0)
        self._ends = np.cumsum(weights)
        total = self._ends[-1]
        with np.errstate(divide="ignore"):
            self._log = np.log(weights / total).astype(np.float32)
        if not unbiased:
            self._log = np.full_like(self._log, -np.log((weights > 0).sum()))
        self._last = int(np.flatnonzero(weights)[-1])
        self.num_items = int((weights > 0).sum())
        """Items that can be drawn."""

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(ids ascending, log of their expected number), each (count,)."""
        places = (np.arange(count) + rng.random(count)) * (self._ends[-1] / max(count, 1))
        ids = np.minimum(np.searchsorted(self._ends, places, side="right"), self._last)
        return ids, self._log[ids] + np.float32(np.log(max(count, 1)))


class BatchMaker:
    """Cuts shuffled batches out of the interactions of a rank's users.

    Args:
        by_user: this rank's users.
        weight: of each user's positives, (rows,) float32.
        most_users: users of a batch.
        most_positives: positives of a batch. A user with more is split over several batches.
    """

    def __init__(
        self,
        by_user: CSR,
        weight: np.ndarray,
        sampler: NegativeSampler,
        *,
        negatives: int,
        most_users: int,
        most_positives: int,
    ) -> None:
        self._csr, self._weight, self._sampler = by_user, weight, sampler
        self._negatives, self._most_users, self._most_positives = negatives, most_users, most_positives
        degrees = np.diff(by_user.indptr)
        active = np.flatnonzero(degrees)
        # parts of equal size: two of one user never fit into a batch
        parts = -(-degrees[active] // most_positives)
        users = np.repeat(active, parts)
        number = np.arange(len(users)) - np.repeat(np.cumsum(parts) - parts, parts)
        size, parts = degrees[users], np.repeat(parts, parts)
        begin = by_user.indptr[users]
        self._users, self._starts = users, begin + size * number // parts
        self._stops = begin + size * (number + 1) // parts

    def epoch(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The parts of users of each batch, in a new order."""
        order = rng.permutation(len(self._users))
        ends = np.cumsum(self._stops[order] - self._starts[order])
        batches, first, before = [], 0, 0
        while first < len(order):
            last = int(np.searchsorted(ends, before + self._most_positives, side="right"))
            last = max(min(last, first + self._most_users), first + 1)
            batches.append(order[first:last])
            first, before = last, int(ends[last - 1])
        return batches

    def in_order(self) -> list[np.ndarray]:
        """The parts of users of each batch, in the order of the users, for work that does not split users."""
        return np.array_split(np.arange(len(self._users)), max(1, -(-len(self._users) // self._most_users)))

    def make(self, parts: np.ndarray, rng: np.random.Generator) -> Batch:
        """The batch of some parts of users; without any, it is empty."""
        starts, stops = self._starts[parts], self._stops[parts]
        indptr = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(stops - starts, out=indptr[1:])
        row = np.repeat(np.arange(len(parts)), stops - starts)
        place = np.arange(indptr[-1]) + (starts - indptr[:-1])[row]
        found, weight = self._csr.indices[place], self._weight[self._users[parts]][row]
        if self._csr.values is not None:
            weight *= self._csr.values[place]
        negatives, log_expected = self._sampler.draw(self._negatives if len(parts) else 0, rng)
        # sort (item, place): positives first by place, then the negatives
        place = np.arange(len(found) + len(negatives))
        keys = np.concatenate([found, negatives]).astype(np.int64) << 32 | place
        keys.sort()
        ids, place = keys >> 32, keys & 0xFFFFFFFF
        new = np.empty(len(ids), bool)
        new[:1] = True
        np.not_equal(ids[1:], ids[:-1], out=new[1:])
        slot = np.empty(len(ids), np.int64)
        slot[place] = np.cumsum(new) - 1
        items = ids[new]
        item_indptr = np.zeros(len(items) + 1, np.int64)
        positive = slot[: len(found)]
        np.cumsum(np.bincount(positive, minlength=len(items)), out=item_indptr[1:])
        return Batch(
            users=self._users[parts],
            items=items,
            indptr=indptr,
            row=row,
            positive=positive,
            weight=weight,
            negative=slot[len(found) :],
            log_expected=log_expected,
            by_item=place[place < len(found)],
            item_indptr=item_indptr,
        )
