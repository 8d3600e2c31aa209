"""Negative sampling for the rows of a batch: uniform, by popularity, or the other rows of the batch.

A draw is a pure function of (seed, epoch, position of the row in the epoch's global order, slot): the same on
CPU and CUDA, for any number of ranks with the same global batch, and after a resume.
"""

from __future__ import annotations

import numpy as np
import torch

from recpress.data.config import NegativesConfig
from recpress.data.errors import InputError
from recpress.data.negatives.interaction_set import AT_ONCE, InteractionSet, mix, on_host, shift, signed
from recpress.data.seeds import key

_ATTEMPTS = 16
"""Redraws of a negative that is one of the user's positives. For a user who has half of the items, one in
2 ** 17 is kept; for one who has them all, all are."""


class Negatives:
    """Draws `count` negatives for each row. Base of the distributions, which map uniform numbers to items.

    Args:
        reject: pairs that are not to be drawn as negatives. A negative that still is one of them after 16
            redraws (a user who has nearly all items) is kept, and counted in `kept_positives`.
    """

    def __init__(self, num_items: int, count: int, seed: int = 0, reject: InteractionSet | None = None) -> None:
        if num_items < 1 or count < 0:
            raise InputError(f"{count} negatives of {num_items} items; expected at least 0 of at least 1")
        self.num_items, self.count, self.seed, self.reject = num_items, count, seed, reject
        self._kept: int | torch.Tensor = 0
        self._redraws: tuple[int, torch.Tensor] | None = None  # epoch, its keys on the device

    @property
    def kept_positives(self) -> int:
        """Negatives so far that are positives of their user, since no other item was found. Waits for the device."""
        return int(self._kept)

    def items(self, uniform: torch.Tensor) -> torch.Tensor:
        """Items of uniform numbers: float64 in [0, 1) -> int64 of the same shape."""
        raise NotImplementedError

    def log_q(self, items: torch.Tensor) -> torch.Tensor:
        """Log of the probability that one draw gives the item. float32, shape of items."""
        raise NotImplementedError

    def draw(self, users: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        """Negatives of the rows at `position`, `position + 1`, … of an epoch's global order.

        Args:
            users: (B,) int64; the draws are made on their device.
            position: `Interactions.position`.

        Returns: (B, count) int64.
        """
        place = torch.arange(position, position + len(users), device=users.device).unsqueeze(1)
        slot = torch.arange(self.count, device=users.device)
        counter = place * self.count + slot  # (B, count)
        items = self.items(self._uniform(counter, epoch, 0))
        if self.reject is None or not items.numel():
            return items
        if self.reject.keys.device != users.device:
            self.reject = self.reject.to(users.device)
        owners = users.unsqueeze(1).expand_as(items).reshape(-1)
        flat, counters = items.reshape(-1), counter.reshape(-1)
        if not on_host(users):
            return self._redrawn(flat, counters, owners, self.reject, epoch).view_as(items)
        bad = self.reject.contains(owners, flat).nonzero().squeeze(1)
        for attempt in range(1, _ATTEMPTS + 1):
            if not len(bad):
                break
            flat[bad] = self.items(self._uniform(counters[bad], epoch, attempt))
            bad = bad[self.reject.contains(owners[bad], flat[bad])]
        self._kept += len(bad)
        return flat.view_as(items)

    def _redrawn(
        self, items: torch.Tensor, counter: torch.Tensor, owners: torch.Tensor, reject: InteractionSet, epoch: int
    ) -> torch.Tensor:
        """The same as the redraws on a CPU, several at once for all items: how many are rejected, only the device
        knows, and the host does not wait for it. All (n,).
        """
        if self._redraws is None or self._redraws[0] != epoch:  # copies to the device, which waits
            keys = [self._key(epoch, attempt) for attempt in range(1, _ATTEMPTS + 1)]
            self._redraws = epoch, torch.tensor(keys, device=items.device).T[..., None].contiguous()
        start, step = self._redraws[1]  # (_ATTEMPTS, 1) each
        rejected = reject.contains(owners, items)
        at_once = min(_ATTEMPTS, max(1, AT_ONCE // len(items)))
        for first in range(0, _ATTEMPTS, at_once):
            some = slice(first, first + at_once)
            drawn = self.items(_uniform(counter * step[some] + start[some]))
            free = ~reject.contains(owners, drawn)
            found = free.any(0)
            choice = torch.where(found, free.to(torch.uint8).argmax(0), len(drawn) - 1)  # the first, or the last draw
            items = torch.where(rejected, drawn.gather(0, choice[None])[0], items)
            rejected = rejected & ~found
        self._kept = self._kept + rejected.sum()
        return items

    def draw_shared(self, users: torch.Tensor, epoch: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Negatives that the rows at `position`, `position + 1`, … share. They depend on the place of the first row,
        so another number of ranks draws others.

        Returns: items (count,) int64, and which of them are no negatives of which row: bool (B, count).
        """
        counter = position * self.count + torch.arange(self.count, device=users.device)
        items = self.items(self._uniform(counter, epoch, 0))
        if self.reject is None:
            return items, torch.zeros(len(users), self.count, dtype=torch.bool, device=users.device)
        if self.reject.keys.device != users.device:
            self.reject = self.reject.to(users.device)
        return items, self.reject.among(users, items)

    def _uniform(self, counter: torch.Tensor, epoch: int, attempt: int) -> torch.Tensor:
        start, step = self._key(epoch, attempt)
        return _uniform(counter * step + start)

    def _key(self, epoch: int, attempt: int) -> tuple[int, int]:
        """(start, step) of the counters of the draws."""
        start, step = (signed(key("negatives", self.seed, epoch, attempt) >> shift) for shift in (0, 64))
        return start, step | 1


def _uniform(counter: torch.Tensor) -> torch.Tensor:
    """Float64 in [0, 1) with 53 random bits: a hash of int64 counters (splitmix64, Steele et al. 2014)."""
    return shift(mix(counter), 11).double() * 2.0**-53


class UniformNegatives(Negatives):
    """Every item is as likely."""

    def items(self, uniform: torch.Tensor) -> torch.Tensor:
        return (uniform * self.num_items).long().clamp_(max=self.num_items - 1)

    def log_q(self, items: torch.Tensor) -> torch.Tensor:
        return torch.full(items.shape, -float(np.log(self.num_items)), device=items.device)


class PopularityNegatives(Negatives):
    """An item is drawn in proportion to count ** power (Mikolov et al. 2013: 0.75).

    An item without a count is never drawn; its `log_q` is that of an item with a count of 1, so that
    corrections by it stay finite; so is that of a positive beyond `counts` (new in a log that grows). Holds 12 bytes an
    item.

    Args:
        counts: (num_items,) occurrences of each item.
    """

    def __init__(
        self,
        counts: np.ndarray | torch.Tensor,
        count: int,
        power: float = 0.75,
        seed: int = 0,
        reject: InteractionSet | None = None,
    ) -> None:
        counts = torch.as_tensor(counts)
        super().__init__(len(counts), count, seed, reject)
        if not (counts >= 0).all() or not (counts > 0).any():
            raise InputError("counts of the items: expected none below 0 and at least one above")
        if not power >= 0:
            raise InputError(f"negatives.power is {power}; expected a number from 0")
        weights = torch.where(counts > 0, counts.double() ** power, 0.0)
        prob, alias = alias_table(weights.numpy())
        self._prob, self._alias = torch.from_numpy(prob), torch.from_numpy(alias)
        rare = torch.ones(1, dtype=torch.float64)  # the last one, for items beyond the counts
        self._log_q = (torch.cat([torch.where(counts > 0, weights, 1.0), rare]).log() - weights.sum().log()).float()

    def items(self, uniform: torch.Tensor) -> torch.Tensor:
        self._move(uniform.device)
        scaled = uniform * self.num_items
        column = scaled.long().clamp_(max=self.num_items - 1)
        return torch.where(scaled - column < self._prob[column], column, self._alias[column].long())

    def log_q(self, items: torch.Tensor) -> torch.Tensor:
        self._move(items.device)
        return self._log_q[items.clamp(max=self.num_items)]

    def _move(self, device: torch.device) -> None:
        if self._log_q.device != device:
            self._prob, self._alias = self._prob.to(device), self._alias.to(device)
            self._log_q = self._log_q.to(device)


def alias_table(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables to draw in proportion to weights in constant time (Walker 1977): draw a column k uniformly and
    x in [0, 1); the item is k if x < prob[k], else alias[k].

    Made without a loop. With p scaled to a mean of 1, light items lack 1 - p and heavy ones exceed by p - 1.
    In a sweep each heavy item fills the light ones in turn, until what they lack, D (summed), passes the
    excess of the heavy ones so far, S (summed); it then lacks D - S, which the next heavy one fills (the
    sweep of Hübschle-Schneider, Sanders 2019, "Parallel weighted random sampling", read as prefix sums).

    Args:
        weights: (n,) float64, none negative, at least one positive.

    Returns: prob (n,) float32, alias (n,) int32 or int64.
    """
    scaled = weights * (len(weights) / weights.sum())
    heavy, light = np.flatnonzero(scaled >= 1), np.flatnonzero(scaled < 1)
    prob, alias = scaled.astype(np.float32), np.arange(len(weights))
    if not len(heavy):  # all are 1 but for rounding
        return np.ones_like(prob), alias.astype(np.int32)
    lacking, excess = np.cumsum(1 - scaled[light]), np.cumsum(scaled[heavy] - 1)
    before = np.concatenate(([0.0], lacking[:-1])) if len(light) else lacking
    alias[light] = heavy[np.searchsorted(excess, before).clip(max=len(heavy) - 1)]
    alias[heavy] = np.concatenate((heavy[1:], heavy[-1:]))
    passing = np.searchsorted(lacking, excess, side="right")
    passed = passing < len(lacking)
    prob[heavy] = 1.0
    prob[heavy[passed]] = 1 - (lacking[passing[passed]] - excess[passed])
    prob[heavy[-1]] = 1.0
    return prob.clip(0.0, 1.0), alias.astype(np.int32 if len(weights) < 2**31 else np.int64)


class InBatchNegatives(PopularityNegatives):
    """The items of the other rows of the batch: no draws, and `log_q` of an item is its share of the rows."""

    def __init__(self, counts: np.ndarray | torch.Tensor) -> None:
        super().__init__(counts, count=0, power=1.0)


def make_negatives(
    config: NegativesConfig,
    num_items: int,
    counts: np.ndarray | torch.Tensor | None = None,
    reject: InteractionSet | None = None,
) -> Negatives:
    """The negatives that a configuration asks for.

    Args:
        counts: occurrences of each item, which `popularity` and `in-batch` need.
        reject: the pairs to reject, where `config.rejects` says so.
    """
    assert config.kind == "uniform" or counts is not None
    if config.kind == "in-batch":
        assert counts is not None
        return InBatchNegatives(counts)
    if config.count < 1:
        raise InputError(f"negatives.count is {config.count}; expected at least 1")
    if config.kind == "uniform":
        return UniformNegatives(num_items, config.count, config.seed, reject)
    assert counts is not None
    return PopularityNegatives(counts, config.count, config.power, config.seed, reject)
