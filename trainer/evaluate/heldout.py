"""Held-out interactions, prepared for evaluation: which rank ranks which users, against which items.

A *case* is one ranking: a user with held-out items and competitors. Cases are sorted by user and cut into chunks of
`chunk` cases. Chunks have the same cases with any world size, so that metrics do not depend on it. Rank r owns
`chunks_per_rank` consecutive chunks. No rank holds more than its share of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import NEGATIVES, Log
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.errors import InputError
from recpress.data.negatives.table import distinct
from recpress.data.sampling.scan import iter_columns
from recpress.trainer.distributed.collectives import (
    all_gather,
    all_reduce,
    exchange,
    rank_and_world,
)
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks

CHUNK = 1024
SEEN = ("train", "val")
"""Parts of a log whose items are masked in a ranking of all items."""
Pairs = tuple[np.ndarray, np.ndarray]  # users, items


@dataclass(frozen=True)
class Heldout:
    """The cases of this rank. Created by `sampled_*` or `full_*` below, which are collective."""

    num_users: int
    num_items: int
    chunk: int
    num_cases: int
    """On all ranks."""
    users: np.ndarray
    """User of each case, (n,) int64, n at most chunks_per_rank * chunk."""
    targets: Jagged
    """Held-out items of each case, int32."""
    facts: dict[str, int] = field(default_factory=dict)
    """Counts of what was skipped, dropped or found, on all ranks."""

    @property
    def chunks_per_rank(self) -> int:
        return _chunks_per_rank(self.num_cases, self.chunk)


@dataclass(frozen=True)
class SampledHeldout(Heldout):
    """One held-out item per case, ranked among given negatives."""

    negatives: Jagged = field(kw_only=True)
    """Competitors of the held-out item of each case, int32."""


@dataclass(frozen=True)
class FullHeldout(Heldout):
    """All held-out items of a user, ranked among all items that the user has not seen."""

    seen: Jagged = field(kw_only=True)
    """Items that the user of each case has seen, int32, ascending; masked."""


def sampled_from_log(log: Log, chunk: int = CHUNK) -> SampledHeldout:
    """The `test_negatives` of the log. Collective; one rank reads each row group.

    Raises:
        InputError: the log has no such file; an id outside the vocabulary; a row without negatives. On every rank.
    """
    if log.test_negatives is None:
        raise InputError(f"{log.path}: no test_negatives.parquet; expected one for ranking among given negatives")
    users: list[np.ndarray] = []
    items: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    negatives: list[np.ndarray] = []
    rank, world = rank_and_world()
    with raise_on_all_ranks():
        columns = [NEGATIVES.user, NEGATIVES.item, "negatives"]
        for data in iter_columns(log.test_negatives, columns, rank=rank, world=world):
            lists = data["negatives"]
            assert isinstance(lists, Jagged)
            users.append(_ids(data[NEGATIVES.user], np.int64))
            items.append(_ids(data[NEGATIVES.item], np.int32))
            lengths.append(lists.lengths)
            negatives.append(lists.values.astype(np.int32))
    lists_read = Jagged(_concat(negatives, np.int32), _offsets(_concat(lengths, np.int64)))
    return sampled_from_arrays(
        _concat(users, np.int64),
        _concat(items, np.int32),
        lists_read,
        num_users=log.num_users,
        num_items=log.num_items,
        chunk=chunk,
    )


def full_from_log(
    log: Log, part: str = "test", masked: tuple[str, ...] = ("train",), chunk: int = CHUNK
) -> FullHeldout:
    """The `test` (or `val`) rows of the log; items of its `masked` parts are masked. Collective.

    Raises:
        InputError: the log has no such part; an id outside the vocabulary. On every rank.
    """
    rows: ParquetSplit | None = getattr(log, part)
    if rows is None:
        raise InputError(f"{log.path}: no {part}.parquet; expected one for ranking all items")
    with raise_on_all_ranks():
        heldout = read_pairs(log, rows)
        seen = [read_pairs(log, others) for name in masked if (others := getattr(log, name)) is not None]
    users = _concat([pairs[0] for pairs in seen], np.int64)
    items = _concat([pairs[1] for pairs in seen], np.int32)
    cases = full_from_pairs(heldout, (users, items), num_users=log.num_users, num_items=log.num_items, chunk=chunk)
    known = torch.zeros(log.num_items, dtype=torch.uint8)
    known[torch.from_numpy(items).long()] = 1
    known = all_reduce(known, dist.ReduceOp.MAX)
    if cold := _total(int((known[torch.from_numpy(cases.targets.values).long()] == 0).sum())):
        cases.facts["targets_without_train"] = cold
    return cases


def read_pairs(log: Log, rows: ParquetSplit) -> Pairs:
    """The (user, item) pairs of the row groups of this rank: users int64, items int32."""
    rank, world = rank_and_world()
    users, items = [], []
    for data in iter_columns(rows, [log.schema.user, log.schema.item], rank=rank, world=world):
        users.append(_ids(data[log.schema.user], np.int64))
        items.append(_ids(data[log.schema.item], np.int32))
    return _concat(users, np.int64), _concat(items, np.int32)


def sampled_from_arrays(
    users: np.ndarray,
    items: np.ndarray,
    negatives: Jagged | np.ndarray,
    *,
    num_users: int,
    num_items: int,
    chunk: int = CHUNK,
) -> SampledHeldout:
    """Cases from arrays, of which each rank passes a part. Collective.

    Args:
        users, items: held-out pairs, (n,).
        negatives: competitors of each: (n, count), or lists of any lengths. The held-out item is removed from its
            own list.

    Raises:
        InputError: an id outside the vocabulary; a row without negatives. On every rank.
    """
    if isinstance(negatives, np.ndarray):
        offsets = np.arange(len(users) + 1, dtype=np.int64) * negatives.shape[1]
        negatives = Jagged(negatives.reshape(-1), offsets)
    with raise_on_all_ranks():
        _check_ids(users, num_users, "held-out user")
        _check_ids(items, num_items, "held-out item")
        _check_ids(negatives.values, num_items, "negative item")
        case = np.repeat(np.arange(len(users)), negatives.lengths)
        kept = negatives.values != items[case]
        lengths = np.bincount(case[kept], minlength=len(users))
        if len(empty := np.flatnonzero(lengths == 0)):
            user = users[empty[0]]
            raise InputError(f"held-out user {user}: no negatives besides the held-out item; expected at least one")
    values = negatives.values[kept].astype(np.int32)
    users, items, values, lengths = _send(users, items, values, lengths, _user_owner(users, num_users))
    order = np.lexsort((items, users))
    users, items, lists = users[order], items[order], Jagged(values, _offsets(lengths)).take(order)
    facts = {
        "users_skipped": num_users - _total(np.sum(np.diff(users, prepend=-1) != 0)),
        "negatives_dropped": _total(np.sum(~kept)),
    }
    place, num_cases = _number(len(users))
    users, items, values, lengths = _send(
        users, items, lists.values, lists.lengths, _case_owner(place, num_cases, chunk)
    )
    return SampledHeldout(
        num_users,
        num_items,
        chunk,
        num_cases,
        users,
        Jagged(items.astype(np.int32), np.arange(len(users) + 1)),
        facts,
        negatives=Jagged(values, _offsets(lengths)),
    )


def full_from_pairs(heldout: Pairs, seen: Pairs, *, num_users: int, num_items: int, chunk: int = CHUNK) -> FullHeldout:
    """Cases from pairs, of which each rank passes a part. Collective.

    A pair that is held out twice counts once. A held-out pair that was also seen is dropped, because it is masked.
    Users without a remaining held-out item are skipped; users who have seen nothing are ranked. `facts` counts these.

    Args:
        heldout: users and items, (n,) each.
        seen: users and items to mask, (m,) each; may have duplicates.

    Raises:
        InputError: an id outside the vocabulary. On every rank.
    """
    with raise_on_all_ranks():
        for (users, items), kind in ((heldout, "held-out"), (seen, "seen")):
            _check_ids(users, num_users, f"{kind} user")
            _check_ids(items, num_items, f"{kind} item")
    given = _total(len(heldout[0]))
    keys, seen_keys = (_distinct_pairs(pairs, num_users, num_items) for pairs in (heldout, seen))
    distinct = _total(len(keys))
    keys = keys[~np.isin(keys, seen_keys, assume_unique=True)]
    users = np.unique(keys // num_items)
    place, num_cases = _number(len(users))
    owner = _case_owner(place, num_cases, chunk)

    def send(keys: np.ndarray) -> list[np.ndarray]:
        case = np.searchsorted(users, keys // num_items)
        known = case < len(users)
        known[known] = users[case[known]] == keys[known] // num_items
        return exchange([place[case[known]], (keys[known] % num_items).astype(np.int32)], owner[case[known]])

    target_places, target_items = send(keys)
    seen_places, seen_items = send(seen_keys)
    (users, place) = exchange([users, place], owner)
    targets = Jagged(target_items, np.searchsorted(target_places, np.append(place, num_cases)))
    masked = Jagged(seen_items, np.searchsorted(seen_places, np.append(place, num_cases)))
    facts = {
        "users_skipped": num_users - num_cases,
        "users_without_train": _total(np.sum(masked.lengths == 0)),
        "heldout_repeated": given - distinct,
        "heldout_seen": distinct - _total(len(target_items)),
    }
    return FullHeldout(num_users, num_items, chunk, num_cases, users, targets, facts, seen=masked)


def _send(
    users: np.ndarray, items: np.ndarray, values: np.ndarray, lengths: np.ndarray, owner: np.ndarray
) -> list[np.ndarray]:
    users, items, lengths_there = exchange([users, items, lengths], owner)
    (values,) = exchange([values], np.repeat(owner, lengths))
    return [users, items, values, lengths_there]


def _distinct_pairs(pairs: Pairs, num_users: int, num_items: int) -> np.ndarray:
    """The distinct pairs of the users that this rank owns, as sorted keys user * num_items + item."""
    users, items = exchange([pairs[0].astype(np.int64), pairs[1]], _user_owner(pairs[0], num_users))
    return distinct(users * num_items + items)


def _user_owner(users: np.ndarray, num_users: int) -> np.ndarray:
    return users // ceil_div(num_users, rank_and_world()[1])


def _case_owner(place: np.ndarray, num_cases: int, chunk: int) -> np.ndarray:
    return place // max(1, chunk * _chunks_per_rank(num_cases, chunk))


def _chunks_per_rank(num_cases: int, chunk: int) -> int:
    return ceil_div(ceil_div(num_cases, chunk), rank_and_world()[1])


def _number(count: int) -> tuple[np.ndarray, int]:
    """(global numbers of the cases of this rank, number of all cases)."""
    counts = [int(of_rank) for of_rank in all_gather(torch.tensor([count]))]
    start = sum(counts[: rank_and_world()[0]])
    return np.arange(start, start + count), sum(counts)


def _total(value: int | np.integer) -> int:
    return int(all_reduce(torch.tensor([int(value)])))


def _check_ids(ids: np.ndarray, limit: int, kind: str) -> None:
    if len(bad := np.flatnonzero((ids < 0) | (ids >= limit))):
        raise InputError(f"{kind} {ids[bad[0]]}: outside the vocabulary; expected 0 to {limit - 1}")


def _ids(column: np.ndarray | Jagged, dtype: type) -> np.ndarray:
    assert isinstance(column, np.ndarray)
    return column.astype(dtype, copy=False)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _concat(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
