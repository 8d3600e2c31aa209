"""Holds one interaction per user out of train: a validation split to choose settings on, or a test split to report.

The result is a new log. Its `train` has no held-out pairs, its `test` has them, and its `test_negatives` has, for each,
items without an interaction of the user in the train of the original log. Ids, vocabularies and side tables do not
change. The held-out parts of the original log are not used, so settings chosen on the new log have not seen them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from recpress.data.config import LayoutConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import KIND, SIDES, Log, Side
from recpress.data.dataset.parquet_split import RowGroup, read_whole
from recpress.data.dataset.schema import cast_rows, stored_as
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.negatives.table import negatives_table
from recpress.data.seeds import generator

logger = logging.getLogger(__name__)


def leave_one_out(
    log: Log,
    out: str | Path,
    *,
    by: Literal["random", "last"],
    seed: int = 0,
    negatives: int = 99,
    max_users: int | None = None,
    layout: LayoutConfig | None = None,
    overwrite: bool = False,
    more: dict[str, Any] | None = None,
) -> str | Path:
    """Write the log `out`: its train is that of `log` without one pair per user, and its test has these pairs.

    A user is included if at least one row remains in train, and at least `negatives` items have no interaction with it.
    `held_out` in the manifest counts the users that are included and those that are not. If the pair occurs in several
    rows, all of them are removed from train. Columns that all files of train have remain.

    Reads the log three times, rarely more often. Memory: O(users + items + held-out users x negatives), and one bit per
    item for each user with almost all items, together at most a quarter of a byte per row.

    Args:
        by: `random`, or `last`: the row with the largest time (of equal ones the last in the log).
        negatives: items without an interaction of the user, drawn uniformly without replacement; 0: no such part.
        max_users: largest number of users to include, drawn at random.
        more: keys of the manifest that replace its own entries about its origin.

    Raises:
        InputError: no time column for `last`; no user can be included; the log cannot be read.
    """
    if by == "last" and log.schema.time is None:
        raise InputError(f"{log.path}: the last interaction needs a time column; name it in the schema (schema.time)")
    if negatives < 0:
        raise InputError(f"negatives is {negatives}; expected at least 0")
    hashed = any(log.hash_fingerprint(log.column(side)) is not None for side in SIDES)
    if negatives and hashed:  # positions of the hash would be written, and hashed again when they are read
        raise InputError(
            f"{log.path}: its ids are hashed while they are read, so that raw ids of negatives are not known; expected "
            "no negatives, which ranks all items (--negatives 0, --evaluation.protocol full), or a log that `recpress "
            "ingest` numbered"
        )
    settings = {"log": log.path, "by": by, "seed": seed, "negatives": negatives, "max_users": max_users}
    own = {"made_by": "leave_one_out", "config": settings}
    meta: dict[str, Any] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite, inputs=[log.path]) as tmp,
        LogWriter(tmp, layout or LayoutConfig()) as writer,
    ):
        counts, chosen = _choose(log, by, seed)
        held, heavy = _include(log, counts, chosen, seed, negatives, max_users)
        left = _write_rows(log, writer, held)
        users = np.flatnonzero(held >= 0)
        if negatives:
            unmet = _draw_negatives(log, users, counts, heavy, negatives, seed)
            kind = _schema(log).field(log.schema.item).type
            writer.part("test_negatives").write(negatives_table(users, held[users], unmet, kind))
        _copy_tables(log, writer, left)
        old = log.manifest or {}
        meta |= writer.manifest(
            log.schema,
            log.num_users,
            log.num_items,
            vocabularies=old.get("vocabularies", {}),
            features=old.get("features", {}),
            held_out={"users": len(users), "left_out": int(np.count_nonzero(counts)) - len(users)},
            **({} if log.sample_of is None else {"sample_of": log.sample_of}),
            **(more or own | {"inputs": log.inputs()}),
        )
    return artifact.place(out)


def _scan(log: Log, columns: list[str], what: str) -> Iterator[tuple[RowGroup, dict[str, Any]]]:
    bar = tqdm(log.train.groups, unit=" row groups", disable=None, desc=what)
    for group in bar:
        yield group, log.train.read(group, columns)


def _choose(log: Log, by: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows per user, (users,), and the item of each user's row that may be held out, -1 without rows."""
    counts = np.zeros(log.num_users, dtype=np.int64)
    chosen = np.full(log.num_users, -1, dtype=np.int64)
    best: np.ndarray | None = None
    user, item, time = log.schema.user, log.schema.item, log.schema.time or ""
    columns = [user, item, time] if by == "last" else [user, item]
    for group, data in _scan(log, columns, "choosing rows"):
        users = data[user]
        if by == "last":
            key = data[time]
        else:  # the row with the smallest random number is a uniform choice
            key = -generator(seed, "leave one out", group.file, group.group).random(len(users))
        if best is None:
            lowest = np.iinfo(np.int64).min if key.dtype == np.int64 else -np.inf
            best = np.full(log.num_users, lowest, dtype=key.dtype)
        np.maximum.at(best, users, key)
        hits = np.flatnonzero(key == best[users])
        chosen[users[hits]] = data[item][hits]  # of several hits of one user numpy stores the last
        counts += np.bincount(users, minlength=log.num_users)
    return counts, chosen


class _Heavy:
    """The items of each user with so many rows that few other items may remain, as bits.

    For other users the number of rows, an upper bound of their items, is sufficient.
    """

    def __init__(self, counts: np.ndarray, num_items: int, negatives: int) -> None:
        self.users = np.flatnonzero(counts > num_items - 4 * negatives) if negatives else np.empty(0, dtype=np.int64)
        self.place = np.full(len(counts), -1, dtype=np.int64)
        self.place[self.users] = np.arange(len(self.users))
        self._width = -(-num_items // 8)
        self._num_items = num_items
        self._bits = np.zeros(len(self.users) * self._width, dtype=np.uint8)

    def add(self, users: np.ndarray, items: np.ndarray) -> None:
        place = self.place[users]
        place, items = place[place >= 0], items[place >= 0]
        np.bitwise_or.at(self._bits, place * self._width + (items >> 3), (128 >> (items & 7)).astype(np.uint8))

    def unmet(self, place: int) -> np.ndarray:
        """The items without an interaction of the user at this place, sorted."""
        bits = np.unpackbits(self._bits[place * self._width : (place + 1) * self._width], count=self._num_items)
        return np.flatnonzero(bits == 0)

    def num_unmet(self) -> np.ndarray:
        """Of each of `users`."""
        return np.array([len(self.unmet(place)) for place in range(len(self.users))], dtype=np.int64)


def _include(
    log: Log, counts: np.ndarray, chosen: np.ndarray, seed: int, negatives: int, max_users: int | None
) -> tuple[np.ndarray, _Heavy]:
    """The held-out item of each user, (users,), -1 without one; and the items of heavy users."""
    copies = np.zeros(log.num_users, dtype=np.int64)  # rows of the chosen pair
    heavy = _Heavy(counts, log.num_items, negatives)
    for _, data in _scan(log, [log.schema.user, log.schema.item], "counting copies"):
        users, items = data[log.schema.user], data[log.schema.item]
        copies += np.bincount(users[items == chosen[users]], minlength=log.num_users)
        heavy.add(users, items)
    unmet = log.num_items - counts  # at least
    unmet[heavy.users] = heavy.num_unmet()
    able = np.flatnonzero((counts > copies) & (unmet >= negatives))
    if not able.size:
        raise InputError(
            f"{log.path}: no user has two items, and {negatives} of {log.num_items} items without an interaction"
        )
    if max_users is not None and able.size > max_users:
        if max_users < 1:
            raise InputError(f"max_users is {max_users}; expected at least 1")
        rng = generator(seed, "leave one out", "users")
        able = np.sort(rng.choice(able, max_users, replace=False))
    held = np.full(log.num_users, -1, dtype=np.int64)
    held[able] = chosen[able]
    return held, heavy


def _write_rows(log: Log, writer: LogWriter, held: np.ndarray) -> dict[Side, np.ndarray]:
    """Write train without the held-out pairs, in order, and one row of each held-out pair, by user, as test.

    Returns how many rows of each user and of each item were removed from train.
    """
    user, item, time = log.schema.user, log.schema.item, log.schema.time
    left: dict[Side, np.ndarray] = {side: np.zeros(log.num_ids(side), dtype=np.int64) for side in SIDES}
    tests = []
    schema = _schema(log)
    for group, data in _scan(log, [user, item], "writing"):
        leaves = data[item] == held[data[user]]
        table = cast_rows(log.train.read_table(group, schema.names), schema, log.train.columns)
        writer.part("train").write(table.filter(pa.array(~leaves)))
        if leaves.any():
            tests.append(table.filter(pa.array(leaves)))
            for side in SIDES:
                left[side] += np.bincount(data[log.column(side)][leaves], minlength=log.num_ids(side))
    test = pa.concat_tables(tests)
    # Of several rows of a pair, the latest is written.
    keys = pa.table(
        {"user": test.column(user), **({"time": test.column(time)} if time else {}), "place": np.arange(test.num_rows)}
    )
    order = pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names])
    users = keys.column("user").take(order).to_numpy()
    last = np.flatnonzero(np.append(users[1:] != users[:-1], True))
    writer.part("test").write(test.take(order.take(pa.array(last))))
    return left


def _schema(log: Log) -> pa.Schema:
    """The schema of the output; files of the log may have different types.

    Columns that the log's schema does not name are written if all files have them, with one type.
    """
    schemas = [file.schema for file in log.train.files if file.metadata]
    named = stored_as(list(log.train.columns.values()), schemas)
    fields = [named.field(field.name) if field.name in named.names else field for field in schemas[0]]
    kept = [
        field
        for field in fields
        if field.name in named.names
        or all(other.names.count(field.name) == 1 and other.field(field.name).type == field.type for other in schemas)
    ]
    if lost := [field.name for field in fields if field not in kept]:
        logger.warning("%s: not written, because its files differ in them: columns %s", log.path, ", ".join(lost))
    return pa.schema([field.with_nullable(True).remove_metadata() for field in kept])


def _draw_negatives(
    log: Log, users: np.ndarray, counts: np.ndarray, heavy: _Heavy, count: int, seed: int
) -> np.ndarray:
    """(users, count) items without an interaction of the user.

    For heavy users, draws from these items. For all other users, draws candidates and removes those with an interaction
    in a pass over the log; users with too few remaining candidates get more, in another pass.
    """
    rng = generator(seed, "leave one out", "negatives")
    size = log.num_items
    place = np.full(log.num_users, -1, dtype=np.int64)  # of a user among `users`
    place[users] = np.arange(len(users))
    seen = np.empty(0, dtype=np.int64)  # keys (place, item) that were candidates before, sorted
    good: list[np.ndarray] = []
    need = np.full(len(users), count)
    for own in np.flatnonzero(heavy.place[users] >= 0).tolist():
        drawn = rng.choice(heavy.unmet(int(heavy.place[users[own]])), count, replace=False)
        good.append(own * size + drawn.astype(np.int64))
        need[own] = 0
    while need.any():
        wanted = np.ceil(need * (size / np.maximum(size - counts[users], 1) * 1.1) + 3 * np.sqrt(need)).astype(np.int64)
        keys = _candidates(rng, np.where(need > 0, wanted, 0), size, seen)
        met = np.zeros(len(keys), dtype=bool)
        for _, data in _scan(log, [log.schema.user, log.schema.item], "drawing negatives"):
            owner = place[data[log.schema.user]]
            pairs = (owner * size + data[log.schema.item])[owner >= 0]
            found = np.minimum(np.searchsorted(keys, pairs), len(keys) - 1)
            met[found[keys[found] == pairs]] = True
        seen = np.sort(np.concatenate((seen, keys)))
        fresh = keys[~met]
        # Take as many as are missing, at random: the first ones have the smallest ids.
        owner = fresh // size
        order = np.lexsort((rng.random(len(fresh)), owner))
        rank = np.arange(len(fresh)) - np.searchsorted(owner, owner)
        kept = fresh[order[rank < need[owner]]]
        good.append(kept)
        need = need - np.bincount(kept // size, minlength=len(users))
    return np.sort(np.concatenate(good)).reshape(len(users), count) % size


def _candidates(rng: np.random.Generator, wanted: np.ndarray, size: int, seen: np.ndarray) -> np.ndarray:
    """Sorted keys (place, item), at most `wanted` per place, none of them in `seen`."""
    owner = np.repeat(np.arange(len(wanted)), wanted)
    keys = np.sort(owner * size + rng.integers(0, size, owner.size))
    keys = keys[np.append(True, keys[1:] != keys[:-1])] if keys.size else keys
    if not seen.size:
        return keys
    return keys[seen[np.minimum(np.searchsorted(seen, keys), len(seen) - 1)] != keys]


def _copy_tables(log: Log, writer: LogWriter, left: dict[Side, np.ndarray]) -> None:
    """Copy side tables, and vocabularies with counts without the rows that were removed from train."""
    for side in SIDES:
        if (table := log.features(side)) is not None:
            writer.table(f"{side}s.parquet", table)
        if (table := log.vocabulary(side)) is not None:
            counts = pa.array(log.counts(side) - left[side])
            place = table.schema.get_field_index("count")
            writer.table(f"vocabulary/{side}.parquet", table.set_column(place, "count", counts))
    for entry in (log.manifest or {}).get("features", {}).values():
        if name := entry.get("vocabulary"):
            writer.table(name, read_whole(log.filesystem, f"{log.root}/{name}"))
