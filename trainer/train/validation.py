"""Validation rows, which choose the epoch of a training run, and the items that they are ranked among.

They are the `val` part of the log, or rows that are held out of the sample of the run. Reading them takes two passes
over the row groups of the sample: one finds the validation rows, one the other items of their users. Each rank reads
its share. A `block` sample has some row groups only, so some negatives are items that the user has elsewhere: about
n / I of them for a user with n rows among I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import iter_row_groups
from recpress.data.errors import InputError
from recpress.data.negatives.interaction_set import InteractionSet, mix, shift, signed
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import HoldOut, Selection
from recpress.data.seeds import key
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.collectives import all_gather_arrays, all_reduce, exchange
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout, full_from_pairs, sampled_from_arrays
from recpress.trainer.evaluate.stage import load_heldout

SHARE = 0.1
"""Share of the sample that is held out:"""
LEAST, MOST = 2_000, 20_000
"""at least and at most this many rows, and"""
LARGEST_SHARE = 0.2
"""never more of the sample than this."""
TOO_FEW = 1_000
"""A sample with fewer rows has no validation rows: they would be too few to compare networks."""
LEAST_CASES = 30
"""Minimum of cases, on all ranks, to choose an epoch. Cases are dropped if their user has the item elsewhere, or has
nearly all items. On fewer cases the choice would be chance."""
MOST_SCORES = 400_000_000
"""Scores of an evaluation that ranks all items: with many items, fewer rows are held out (at least LEAST)."""
NEGATIVES = 99
BLOCK_NEGATIVES = 999
"""If the protocol ranks all items, but not all items of a user are known."""
_ATTEMPTS = 16
Pairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ValidationRows:
    """The rows on which the networks of a run are compared."""

    heldout: SampledHeldout | FullHeldout
    source: str
    """`val`, `sample` or `test`."""
    weights: np.ndarray | None
    """Of each case of this rank, float64; None: equal. A sample has more rows of active users, and held-out parts
    usually have the same number of rows per user: the weights give all users the same weight."""
    item_counts: np.ndarray | None
    """Rows of each item in the sample, without held-out rows, (items,) int64; None if not counted."""

    @property
    def full(self) -> bool:
        """Whether all items are ranked."""
        return isinstance(self.heldout, FullHeldout)


@dataclass(frozen=True)
class NoRows:
    """Why there are no validation rows, although the configuration requires them."""

    why: str


def plan_hold_out(config: TrainConfig, log: Log) -> HoldOut | None:
    """Which rows of the sample are held out; None: none. A pure function of the files and the configuration."""
    evaluation = config.evaluation
    if (
        not evaluation.while_training
        or evaluation.validation == "test"
        or (evaluation.validation == "auto" and log.val is not None)
    ):
        return None
    count = Selection(log.train, config.sample).num_rows
    if count < TOO_FEW:
        return None
    return HoldOut(
        rate=min(LARGEST_SHARE, max(SHARE, LEAST / count), _most(config, log) / count), seed=config.sample.seed
    )


def load_validation(
    config: TrainConfig, log: Log, hold_out: HoldOut | None, ranks: Ranks, *, count_items: bool
) -> ValidationRows | NoRows | None:
    """The validation rows; `NoRows` if there are too few; None if none are required. Collective.

    Args:
        hold_out: result of `plan_hold_out`.
        count_items: count the rows of each item in the sample.

    Raises:
        InputError: the log cannot be read. On every rank.
    """
    evaluation = config.evaluation
    if not evaluation.while_training:
        return None
    if evaluation.validation == "test":
        if log.test is None and log.test_negatives is None:
            raise InputError(f"{log.path}: no test part; evaluation.validation 'test' needs one (expected 'auto')")
        of_test = load_heldout(log, evaluation)
        if of_test.num_cases < LEAST_CASES:
            return _too_few(of_test.num_cases, "test")
        return ValidationRows(of_test, "test", None, log.counts("item") if count_items else None)
    selection = Selection(log.train, config.sample, hold_out=hold_out)
    counts = np.zeros(log.num_items if count_items else 0, dtype=np.int64)
    with raise_on_all_ranks():
        of_sample = _held_pairs(config, log, selection, ranks, counts) if hold_out or count_items else _no_pairs()
        of_val = _val_pairs(config, log, ranks) if hold_out is None and evaluation.validation == "auto" else None
    if hold_out is None and of_val is None:
        count = selection.num_rows
        return NoRows(f"too few rows to hold validation rows out: {count:,} in the sample, expected {TOO_FEW:,}")
    held = of_sample if of_val is None else of_val
    source = "val" if of_val is not None else "sample"
    if count_items:
        counts = all_reduce(torch.from_numpy(counts)).numpy()
    users = np.unique(np.concatenate([arrays[0] for arrays in all_gather_arrays([np.unique(held[0])])]))
    if not len(users):
        return _too_few(0, source)
    with raise_on_all_ranks():
        seen = _seen_pairs(log, selection, users, ranks)
    whole = config.sample.rate == 1.0 or config.sample.kind != "block"
    heldout: SampledHeldout | FullHeldout
    if _full(config, log) and whole and not log.is_part:
        heldout = full_from_pairs(held, seen, num_users=log.num_users, num_items=log.num_items)
    else:
        count = BLOCK_NEGATIVES if _full(config, log) else NEGATIVES
        heldout = _sampled(held, seen, log, count, config.sample.seed)
    if heldout.num_cases < LEAST_CASES:
        return _too_few(heldout.num_cases, source)
    weights = None
    if source == "sample":
        assert hold_out is not None
        rate = hold_out.rate * config.sample.rate
        weights = _weights(heldout, users, np.concatenate([held[0], seen[0]]), rate)
    return ValidationRows(heldout, source, weights, counts if count_items else None)


def _too_few(cases: int, source: str) -> NoRows:
    of = "the sample" if source == "sample" else f"the {source} part"
    return NoRows(
        f"too few validation rows: {cases:,} cases are left of {of}, where items that a user has elsewhere and users "
        f"who have all items do not count, and {LEAST_CASES} are needed"
    )


def _full(config: TrainConfig, log: Log) -> bool:
    """Whether the protocol of the log ranks all items."""
    if config.evaluation.protocol != "auto":
        return config.evaluation.protocol == "full"
    return log.test is not None and log.test_negatives is None


def _most(config: TrainConfig, log: Log) -> int:
    return max(LEAST, min(MOST, MOST_SCORES // log.num_items)) if _full(config, log) else MOST


def _held_pairs(config: TrainConfig, log: Log, selection: Selection, ranks: Ranks, counts: np.ndarray) -> Pairs:
    """Held-out pairs of the row groups of this rank. Adds the other rows of the sample to `counts`, unless empty."""
    user, item, label = log.schema.user, log.schema.item, log.schema.label if config.use_label else None
    found: list[Pairs] = [_no_pairs()]
    places = selection.candidates[ranks.rank :: ranks.world_size].tolist()
    for place, data in iter_row_groups(log.train, [user, item] + ([label] if label else []), places):
        held = selection.held_out(place)
        if label:  # a negative label is not an item to rank first
            held = held[data[label][held] >= 0.5]
        found.append((data[user][held], data[item][held]))
        if len(counts):
            kept = selection.of(place)
            counts += np.bincount(data[item] if kept is None else data[item][kept], minlength=len(counts))
    return _joined(found)


def _val_pairs(config: TrainConfig, log: Log, ranks: Ranks) -> Pairs | None:
    """Pairs of this rank's share of the `val` part, all or none of a user; None if the log has no such part."""
    if log.val is None:
        return None
    user, item = log.schema.user, log.schema.item
    share = min(1.0, _most(config, log) / log.val.num_rows)
    found: list[Pairs] = [_no_pairs()]
    for data in iter_columns(log.val, [user, item], rank=ranks.rank, world=ranks.world_size):
        users, items = np.array(data[user]), np.array(data[item])  # torch needs writable memory, unlike Arrow's
        kept = _uniform(torch.from_numpy(users), config.sample.seed, "val users").numpy() < share
        found.append((users[kept], items[kept]))
    return _joined(found)


def _seen_pairs(log: Log, selection: Selection, users: np.ndarray, ranks: Ranks) -> Pairs:
    """Pairs of these users (ascending) in this rank's row groups of the sample, without held-out rows."""
    user, item = log.schema.user, log.schema.item
    found: list[Pairs] = [_no_pairs()]
    places = selection.candidates[ranks.rank :: ranks.world_size].tolist()
    for place, data in iter_row_groups(log.train, [user, item], places):
        at = np.minimum(np.searchsorted(users, data[user]), len(users) - 1)
        wanted = users[at] == data[user]
        wanted[selection.held_out(place)] = False
        found.append((data[user][wanted], data[item][wanted]))
    return _joined(found)


def _sampled(held: Pairs, seen: Pairs, log: Log, count: int, seed: int) -> SampledHeldout:
    """Each held-out pair that its user does not have elsewhere, with up to `count` items that its user does not have.

    A draw is a pure function of the seed and the pair. A draw of an item of the user is repeated. Collective.
    """
    world_users = -(-log.num_users // torch.distributed.get_world_size())
    held = _sent(held, world_users)
    seen = _sent(seen, world_users)
    seen_set = InteractionSet.of_pairs(*seen, log.num_items)
    users, items = (torch.from_numpy(array) for array in held)
    new = ~seen_set.contains(users, items)
    users, items = users[new], items[new]
    met = InteractionSet.of_pairs(
        np.concatenate([seen[0], users.numpy()]), np.concatenate([seen[1], items.numpy()]), log.num_items
    )
    owner = users.repeat_interleave(count)
    counter = (users * log.num_items + items).unsqueeze(1) * count + torch.arange(count)
    counter = counter.reshape(-1)
    drawn = torch.zeros(len(owner), dtype=torch.int64)
    left = torch.arange(len(owner))
    for attempt in range(_ATTEMPTS):
        if not len(left):
            break
        uniform = _uniform(counter[left], seed, f"negatives {attempt}")
        drawn[left] = (uniform * log.num_items).long().clamp_(max=log.num_items - 1)
        left = left[met.contains(owner[left], drawn[left])]
    usable = torch.ones(len(owner), dtype=torch.bool)
    usable[left] = False
    # distinct negatives of each case, sorted by case and item
    case = torch.arange(len(users)).repeat_interleave(count)
    keys = torch.unique(case[usable] * log.num_items + drawn[usable])
    lengths = torch.bincount(keys // log.num_items, minlength=len(users))
    kept = lengths > 0
    offsets = torch.nn.functional.pad(lengths[kept].cumsum(0), (1, 0))
    lists = Jagged((keys % log.num_items).numpy(), offsets.numpy())
    return sampled_from_arrays(
        users[kept].numpy(), items[kept].numpy(), lists, num_users=log.num_users, num_items=log.num_items
    )


def _weights(heldout: SampledHeldout | FullHeldout, users: np.ndarray, of_rows: np.ndarray, rate: float) -> np.ndarray:
    """One over the expected number of cases of the case's user, for each case of this rank. Collective.

    Args:
        users: all users with validation rows, ascending.
        of_rows: user of each row of these users that this rank has read.
        rate: share of the log that is held out.
    """
    counts = torch.from_numpy(np.bincount(np.searchsorted(users, of_rows), minlength=len(users)))
    rows = all_reduce(counts).numpy()[np.searchsorted(users, heldout.users)]
    rows = np.maximum(rows, 1)
    return 1.0 / (1.0 - (1.0 - rate) ** rows if isinstance(heldout, FullHeldout) else rows)


def _sent(pairs: Pairs, users_per_rank: int) -> Pairs:
    """The pairs of the users that this rank owns, sorted."""
    users, items = exchange([pairs[0].astype(np.int64), pairs[1].astype(np.int64)], pairs[0] // users_per_rank)
    order = np.lexsort((items, users))
    return users[order], items[order]


def _uniform(counter: torch.Tensor, seed: int, what: str) -> torch.Tensor:
    """Float64 in [0, 1): a hash of int64 counters."""
    start, step = (signed(key("validation", what, seed) >> bits) for bits in (0, 64))
    return shift(mix(counter * (step | 1) + start), 11).double() * 2.0**-53


def _joined(parts: Sequence[Pairs]) -> Pairs:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _no_pairs() -> Pairs:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
