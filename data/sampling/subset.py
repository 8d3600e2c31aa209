"""Subsets of the rows of a log that are no random samples: the densest core, the latest rows, rows of popular items.

They are the usual ways to shrink a log, to compare with. Rows do not have equal probabilities, so no statistic of the
log can be estimated from them. Choosing takes 16 to 40 bytes per row of the log in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from recpress.data.config import LayoutConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import KIND, Log
from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.sampling.sample import copy_unchanged, selected_tables
from recpress.data.seeds import generator

SubsetKind = Literal["core", "recent", "popular"]
"""`core`: rows of the densest k-core of users and items; `recent`: the latest rows; `popular`: rows drawn with
probability proportional to the count of their item."""


class Subset:
    """The chosen rows of a log, as a `Selection`.

    Args:
        chosen: of all rows, in the order of the row groups, (rows,) bool.
    """

    def __init__(self, rows: ParquetSplit, chosen: np.ndarray) -> None:
        sizes = [group.num_rows for group in rows.groups]
        self._parts = np.split(chosen, np.cumsum(sizes)[:-1])
        self.candidates = np.array([j for j, part in enumerate(self._parts) if part.any()], dtype=np.int64)

    def of(self, group: int) -> np.ndarray:
        """Sorted int64 places of the chosen rows of a row group."""
        return np.flatnonzero(self._parts[group])


def choose_rows(log: Log, kind: SubsetKind, rate: float, seed: int = 0) -> np.ndarray:
    """Which of the rows of train are in the subset of round(rate x rows) rows, at least one: (rows,) bool.

    Args:
        seed: of the draw; of `core` and `recent`, of the choice among equals.

    Raises:
        InputError: `recent` of a log without a time column; what reading the log raises.
    """
    if kind == "recent" and log.schema.time is None:
        raise InputError(f"{log.path}: the latest rows need a time column; the schema names none (schema.time)")
    rng = generator("subset", kind, seed)
    size = max(1, round(rate * log.train.num_rows))
    found = np.zeros(log.train.num_rows, dtype=bool)
    if kind == "recent":
        assert log.schema.time is not None
        (times,) = _columns(log, [log.schema.time])
        found[np.lexsort((rng.random(len(times)), times))[-size:]] = True
        return found
    users, items = _columns(log, [log.schema.user, log.schema.item])
    rows = densest_core(users, items, size, rng) if kind == "core" else by_popularity(items, size, rng)
    found[rows] = True
    return found


def densest_core(users: np.ndarray, items: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` rows of the k-core with the largest k that has as many: the (k + 1)-core, and other rows of the k-core at
    random.

    In a k-core every user and every item has at least k rows.

    Args:
        users, items: (rows,) ids.
        size: at most the number of rows.

    Returns:
        Places of the rows, int64.
    """
    low, outer = 1, np.arange(len(users))
    high, inner = 2, _core(users, items, outer, 2)
    while len(inner) >= size:
        low, outer, high = high, inner, 2 * high
        inner = _core(users, items, outer, high)
    while high - low > 1:
        middle = (low + high) // 2
        rows = _core(users, items, outer, middle)
        if len(rows) >= size:
            low, outer = middle, rows
        else:
            high, inner = middle, rows
    rest = np.setdiff1d(outer, inner, assume_unique=True)
    return np.concatenate([inner, rng.choice(rest, size - len(inner), replace=False)])


def _core(users: np.ndarray, items: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k-core of these rows: drop users and items with fewer until there are none."""
    while True:
        kept = rows
        for ids in (users, items):
            degree = np.bincount(ids[kept], minlength=1)
            kept = kept[degree[ids[kept]] >= k]
        if len(kept) == len(rows):
            return kept
        rows = kept


def by_popularity(items: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` rows drawn without replacement, each in proportion to the count of its item (Efraimidis and Spirakis
    2006). Places, int64."""
    keys = rng.exponential(size=len(items)) / np.bincount(items)[items]
    return np.argpartition(keys, size - 1)[:size]


def write_subset(log: Log, out: str | Path, chosen: np.ndarray, made_by: str) -> None:
    """Write a log whose train is the chosen rows, with the ids, held-out parts and side tables of `log`.

    The other rows become its part `val`, with those of the log's own: users and items only. So a ranking of all items
    masks what the whole log masks.

    Args:
        chosen: see `choose_rows`.
        made_by: for the manifest.
    """
    old = log.manifest or {}
    meta: dict[str, Any] = {}
    with artifact.writing(out, KIND, meta, inputs=[log.path]) as tmp, LogWriter(tmp, LayoutConfig()) as writer:
        for table in selected_tables(log, Subset(log.train, chosen)):
            writer.part("train").write(table)
        for table in _others(log, chosen):
            writer.part("val").write(table)
        copied = copy_unchanged(log, tmp, parts=("test", "test_negatives"))
        meta |= writer.manifest(
            log.schema,
            log.num_users,
            log.num_items,
            vocabularies=old.get("vocabularies", {}),
            features=old.get("features", {}),
            made_by=made_by,
        )
        meta["files"] += [artifact.describe_file(tmp / name, name) for name in copied]


def _others(log: Log, chosen: np.ndarray) -> Iterator[pa.Table]:
    """Users and items of the rows that were not chosen, and of the log's own part `val`."""
    names = [log.schema.user, log.schema.item]
    start = 0
    for _, data in iter_row_groups(log.train, names):
        stop = start + len(data[names[0]])
        yield pa.table({name: data[name][~chosen[start:stop]] for name in names})
        start = stop
    if log.val is not None:
        for _, data in iter_row_groups(log.val, names):
            yield pa.table({name: data[name] for name in names})


def _columns(log: Log, names: list[str]) -> list[np.ndarray]:
    """Whole columns of train."""
    parts = [data for _, data in iter_row_groups(log.train, names)]
    return [np.concatenate([part[name] for part in parts]) for name in names]
