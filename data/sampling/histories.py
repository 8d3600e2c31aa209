"""The latest items of each user, from the examples of a log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recpress.data.config import SampleConfig
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import iter_row_groups
from recpress.data.sampling.selection import HoldOut, Selection

_AT_ONCE = 1 << 22  # rows


def latest_items(
    log: Log, length: int, *, sample: SampleConfig | None = None, hold_out: HoldOut | None = None
) -> Jagged:
    """Items of each user in train, (num_users) lists of int32: the latest `length` by the time column of the log, or
    the last ones in the order of the files if it has none.

    Memory: that of the result, and of some million rows.

    Args:
        sample, hold_out: rows of this sample that are held out do not count.

    Raises:
        InputError: see `ParquetSplit.read`.
    """
    schema = log.schema
    names = [schema.user, schema.item, *([schema.time] if schema.time is not None else [])]
    selection = None if hold_out is None else Selection(log.train, sample, hold_out=hold_out)
    kept: list[np.ndarray] = [np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64)]
    parts: list[list[np.ndarray]] = []
    waiting = 0
    for group, data in iter_row_groups(log.train, names):
        columns = [np.asarray(data[name]) for name in names]
        if selection is not None:
            columns = [np.delete(column, selection.held_out(group)) for column in columns]
        if schema.time is None:
            columns.append(np.zeros(len(columns[0]), np.int64))
        parts.append(columns)
        waiting += len(columns[0])
        if waiting >= _AT_ONCE:
            kept, parts, waiting = _latest([kept, *parts], length), [], 0
    users, items, _ = _latest([kept, *parts], length)
    lengths = np.bincount(users, minlength=log.num_users)
    return Jagged(items, np.concatenate([[0], np.cumsum(lengths)]))


def _latest(parts: Sequence[Sequence[np.ndarray]], length: int) -> list[np.ndarray]:
    """(users, items, times) of the last `length` rows of each user, by user, time and place."""
    users, items, times = (np.concatenate([part[column] for part in parts]) for column in range(3))
    order = np.lexsort((times, users))  # stable
    users = users[order]
    place_from_end = np.searchsorted(users, users, side="right") - np.arange(len(users))
    order = order[place_from_end <= length]
    return [users[place_from_end <= length], items[order].astype(np.int32), times[order]]
