"""A sample that is stratified by user: of each user's n rows floor(rate * n) or ceil(rate * n).

Systematic sampling within each user (Madow 1949): a user has a random start, uniform in [0, 1); each of its rows, in
the order of the log, adds `rate`, and is a member where the sum passes an integer. So the rounding is random, every row
is a member with probability exactly `rate`, users are independent of each other, and a user's members lie evenly over
its history: of rows of one user that follow each other closely at most one is a member.

That needs a pass over the column of users, in the order of the log: about 80 ns a row on one core beside the decoding,
and 8 bytes a user meanwhile. The result is one bit per row (125 MB for a billion) in a file of the local cache
(`object_store.cache_folder`), which the ranks of a machine, and later runs on the same files, map into memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np

from recpress.data.dataset import object_store
from recpress.data.dataset.atomic import replacing
from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups
from recpress.data.errors import InputError
from recpress.data.seeds import philox

_CHUNK = 1 << 17
"""Rows that are marked together: what sorting them takes stays in the processor's cache."""
_VERSION = 1
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)


class UserSample:
    """The members of a sample of `rows` that is stratified by user; reads the column of users, or the cache.

    Raises:
        InputError: the log has no column of users, or one that cannot be read; the cache cannot be written.
    """

    def __init__(self, rows: ParquetSplit, rate: float, seed: int) -> None:
        self._sizes = [group.num_rows for group in rows.groups]
        self._starts = np.concatenate(([0], np.cumsum([(size + 7) // 8 for size in self._sizes])))
        self._bits = _cached(rows, rate, seed, int(self._starts[-1]))
        self.counts = np.array([_ONES[self._of(group)].sum() for group in range(len(self._sizes))], dtype=np.int64)
        """Members of each row group. (groups,) int64"""

    def members(self, group: int) -> np.ndarray:
        """Sorted int64 rows of a row group."""
        return np.flatnonzero(np.unpackbits(self._of(group), count=self._sizes[group]))

    def _of(self, group: int) -> np.ndarray:
        return self._bits[self._starts[group] : self._starts[group + 1]]


class Marker:
    """Tells members from the users of the rows, given in the order of the log.

    Each user has a phase in units of 2**-64, to which each of its rows adds `rate`; an overflow makes a member.
    """

    def __init__(self, rate: float, seed: int, num_users: int = 0) -> None:
        self._step = np.uint64(int(Fraction(rate) * 2**64))
        self._starts = philox("user sample", seed)
        self._phases = self._starts.random_raw(num_users)

    def mark(self, users: np.ndarray) -> np.ndarray:
        """Whether each of the next rows is a member: (rows,) int64, ids >= 0 -> (rows,) bool."""
        if len(users) and (missing := int(users.max()) + 1 - len(self._phases)) > 0:
            self._phases = np.append(self._phases, self._starts.random_raw(max(missing, len(self._phases) // 2)))
        return np.concatenate(
            [np.empty(0, dtype=bool)]
            + [self._mark(users[first : first + _CHUNK]) for first in range(0, len(users), _CHUNK)]
        )

    def _mark(self, users: np.ndarray) -> np.ndarray:
        order = _by_user(users)
        grouped = users[order]
        firsts = np.flatnonzero(np.append(True, grouped[1:] != grouped[:-1]))
        lengths = np.diff(np.append(firsts, len(users)))
        own = grouped[firsts]
        ordinals = np.arange(1, len(users) + 1) - np.repeat(firsts, lengths)  # 1 for a user's first row
        passed = np.repeat(self._phases[own], lengths) + ordinals.astype(np.uint64) * self._step
        self._phases[own] += lengths.astype(np.uint64) * self._step
        marks = np.empty(len(users), dtype=bool)
        marks[order] = passed < self._step
        return marks


def _by_user(users: np.ndarray) -> np.ndarray:
    """Places of the rows in the order of users, those of a user in their own order: a radix sort, 16 bits at a time."""
    order = np.argsort((users & 0xFFFF).astype(np.uint16), kind="stable")
    largest, shift = int(users.max()), 16
    while largest >> shift:
        order = order[np.argsort(((users >> shift) & 0xFFFF).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order


def _cached(rows: ParquetSplit, rate: float, seed: int, size: int) -> np.ndarray:
    """The bits of all row groups, each from a byte of its own on: (size,) uint8, mapped."""
    if rows.user is None:
        raise InputError("sample.kind is 'user': expected a log with a column of users; its schema names none")
    files = [(entry["size"], entry["fingerprint"]) for entry in rows.describe_files()]
    about = [_VERSION, rows.user, rate, seed, files, [(g.file, g.group, g.num_rows) for g in rows.groups]]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = object_store.cache_folder() / f"sample-{key}" / "members.npy"
    with object_store.locked(path.parent):
        if not path.exists():
            _write(path, _bits(rows, rate, seed, size))
    return np.load(path, mmap_mode="r")


def _bits(rows: ParquetSplit, rate: float, seed: int, size: int) -> np.ndarray:

    # Skipping a row group would change the sample of its users in other row groups: read all of them.
    rows = ParquetSplit(**{part.name: getattr(rows, part.name) for part in fields(ParquetSplit)})
    assert rows.user is not None
    bits = np.empty(size, dtype=np.uint8)
    marker = Marker(rate, seed, rows.columns[rows.user].limit or 0)
    start = 0
    for _, data in iter_row_groups(rows, [rows.user]):
        users = data[rows.user]
        assert isinstance(users, np.ndarray)
        packed = np.packbits(marker.mark(users))
        bits[start : start + len(packed)] = packed
        start += len(packed)
    assert start == size
    return bits


def _write(path: Path, bits: np.ndarray) -> None:
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, bits)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}; RECPRESS_CACHE names another folder") from error
