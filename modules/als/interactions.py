"""Move the interactions of all ranks to the ranks that own their users and items: CSR by user and CSR by item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.memory_hook import memory_freed

_BUFFER = 1 << 16  # pairs to sort into pieces at once
_ROUND_PIECES = 32  # rounds of the exchange; a round has about 1/32 of the pairs in working memory
_MAX_ID = 2**31 - 1


@dataclass
class CSR:
    """Rows from `start` of a sparse matrix.

    indptr: (rows + 1,) int64; indices: (nnz,) int32, global ids of the other side; values: (nnz,) float32, or None if
    all are one.
    """

    start: int
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


class InteractionBuilder:
    """Collects (user, item, value) triples on all ranks, and gives each rank the CSRs of its users and of its items.

    Memory: 8 bytes per pair while collecting (12 with values), which shrink to the two CSRs. Working memory in
    addition: about 1/32 of the pairs, and one buffer of 2**16 pairs.
    """

    def __init__(self, num_users: int, num_items: int, exchange: Exchange) -> None:
        for side, count in (("users", num_users), ("items", num_items)):
            if not 0 < count <= _MAX_ID:
                raise ValueError(f"number of {side}: expected 1 to {_MAX_ID}, got {count}")
        self.num_users, self.num_items, self.exchange = num_users, num_items, exchange
        self.user_blocks = RowBlocks(num_users, exchange.world)
        self.item_blocks = RowBlocks(num_items, exchange.world)
        # cut the users of a rank again, so that a round brings all pairs of a range of users
        self._cut = RowBlocks(self.user_blocks.block, _ROUND_PIECES)
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._pending_rows = 0
        self._pieces = [_Piece() for _ in range(exchange.world * _ROUND_PIECES)]
        self.rows = 0
        self._valued = False

    def add(self, users: np.ndarray, items: np.ndarray, values: np.ndarray | None = None) -> None:
        """Add one chunk. Raises ValueError that names the first bad id or value, and then adds nothing."""
        users, items = np.asarray(users), np.asarray(items)
        _check_ids(users, "user", self.num_users, self.rows)
        _check_ids(items, "item", self.num_items, self.rows)
        if len(users) != len(items) or (values is not None and len(values) != len(users)):
            raise ValueError(f"interactions: {len(users)} users, {len(items)} items and values differ in length")
        if values is not None:
            values = np.asarray(values)
            self._check_values(users, items, values)
        for first in range(0, len(users), _BUFFER):  # without a copy of the whole chunk
            part = slice(first, first + _BUFFER)
            weights = None if values is None else values[part].astype(np.float32)
            if weights is not None and (weights == 1).all():
                weights = None
            self._valued |= weights is not None
            self._pending.append((users[part].astype(np.int32), items[part].astype(np.int32), weights))
            self._pending_rows += len(users[part])
            if self._pending_rows >= _BUFFER:
                self._flush()
        self.rows += len(users)

    def _check_values(self, users: np.ndarray, items: np.ndarray, values: np.ndarray) -> None:
        for first in range(0, len(values), _BUFFER):
            weights = values[first : first + _BUFFER].astype(np.float32)
            bad = ~(np.isfinite(weights) & (weights >= 0))
            if bad.any():
                row = first + int(np.argmax(bad))
                raise ValueError(
                    f"interaction {self.rows + row} (user {users[row]}, item {items[row]}): "
                    f"value {np.float32(values[row])}, expected a finite number >= 0"
                )

    def _flush(self) -> None:
        """Sort the pending pairs into the pieces of their ranges of users."""
        if not self._pending:
            return
        users = _join([chunk[0] for chunk in self._pending])
        items = _join([chunk[1] for chunk in self._pending])
        values = None
        if any(chunk[2] is not None for chunk in self._pending):
            values = _join([_ones(len(u)) if v is None else v for u, _, v in self._pending])
        self._pending, self._pending_rows = [], 0
        for first in range(0, len(users), _BUFFER):
            part = slice(first, first + _BUFFER)
            owner, place = np.divmod(users[part], self.user_blocks.block)
            piece = owner * _ROUND_PIECES + place // self._cut.block
            if len(self._pieces) < 1 << 15:
                piece = piece.astype(np.int16)  # numpy uses radix sort for int16
            order = np.argsort(piece, kind="stable")
            bounds = np.searchsorted(piece[order], np.arange(len(self._pieces) + 1))
            keys = (users[part].astype(np.int64) << 32 | items[part])[order]
            sorted_values = None if values is None else values[part][order]
            for k in np.flatnonzero(np.diff(bounds)):
                cut = slice(bounds[k], bounds[k + 1])
                self._pieces[k].append(keys[cut], None if sorted_values is None else sorted_values[cut])

    def build(self) -> tuple[CSR, CSR]:
        """CSR of this rank's users and of its items. Collective. Empties the builder."""
        self._flush()
        self._valued = bool(self.exchange.max(int(self._valued)))
        users = self._by_user()
        items = self._by_item(users)
        memory_freed()
        return users, items

    def _by_user(self) -> CSR:
        world, rank = self.exchange.world, self.exchange.rank
        start, num_rows = self.user_blocks.start(rank), self.user_blocks.size(rank)
        counts = np.zeros(num_rows, np.int64)
        valued = self._valued  # on this rank, so far
        indices, values = _Growing(np.int32), _Growing(np.float32)
        for k in range(_ROUND_PIECES):
            keys_out, values_out = [], []
            for owner in range(world):
                piece = owner * _ROUND_PIECES + k
                piece_keys, piece_values = self._pieces[piece].take(self._valued)
                keys_out.append(piece_keys)
                values_out.append(piece_values)
                self._pieces[piece] = _Piece()
            keys = self.exchange.all_to_all(keys_out)
            weights = self.exchange.all_to_all(values_out) if self._valued else None
            keys, weights = _summed(keys, weights)
            if weights is not None and not valued:  # the first duplicates: all earlier values were ones
                valued = True
                values.append(_ones(len(indices)))
            counts += np.bincount((keys >> 32) - start, minlength=num_rows)
            indices.append((keys & 0xFFFFFFFF).astype(np.int32))
            if valued:
                values.append(_ones(len(keys)) if weights is None else weights)
        self._valued = bool(self.exchange.max(int(valued)))
        if self._valued and len(values) < len(indices):  # another rank has duplicates
            values.append(_ones(len(indices) - len(values)))
        return CSR(start, _offsets(counts), indices.array(), values.array() if self._valued else None)

    def _by_item(self, users: CSR) -> CSR:
        rank = self.exchange.rank
        start, num_rows = self.item_blocks.start(rank), self.item_blocks.size(rank)
        counts = np.zeros(num_rows, np.int64)
        for keys, _ in self._to_items(users, with_values=False):
            counts += np.bincount((keys >> 32) - start, minlength=num_rows)
        indptr = _offsets(counts)
        cursor = indptr[:-1].copy()
        indices = np.empty(indptr[-1], np.int32)
        values = np.empty(indptr[-1], np.float32) if self._valued else None
        for keys, weights in self._to_items(users, with_values=self._valued):
            if weights is None:
                keys.sort()
            else:
                order = np.argsort(keys)
                keys, weights = keys[order], weights[order]
            rows = (keys >> 32) - start
            here = np.bincount(rows, minlength=num_rows)
            place = np.arange(len(rows)) + (cursor - _offsets(here)[:-1])[rows]
            indices[place] = (keys & 0xFFFFFFFF).astype(np.int32)
            if values is not None:
                values[place] = weights
            cursor += here
        return CSR(start, indptr, indices, values)

    def _to_items(self, users: CSR, with_values: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Rounds of (item << 32 | user) keys and values, received by the owners of the items."""
        nnz = len(users.indices)
        size = max(_BUFFER, nnz // _ROUND_PIECES)
        for k in range(self.exchange.max(-(-nnz // size))):
            part = slice(k * size, (k + 1) * size)
            items = users.indices[part].astype(np.int64)
            entry = np.arange(part.start, part.start + len(items))
            row = np.searchsorted(users.indptr, entry, side="right") - 1 + users.start
            keys = items << 32 | row
            owner = items // self.item_blocks.block
            order = np.argsort(owner, kind="stable") if self.exchange.world > 1 else slice(None)
            bounds = np.bincount(owner, minlength=self.exchange.world).cumsum()[:-1]
            received = self.exchange.all_to_all(np.split(keys[order], bounds))
            weights = None
            if with_values and users.values is not None:
                weights = self.exchange.all_to_all(np.split(users.values[part][order], bounds))
            yield received, weights


class _Piece:
    """Pairs of one range of users, in order of arrival. Stores values from the first that is not 1."""

    def __init__(self) -> None:
        self._keys, self._values = _Growing(np.int64), _Growing(np.float32)
        self._valued = False

    def append(self, keys: np.ndarray, values: np.ndarray | None) -> None:
        if values is not None and not self._valued:
            self._valued = True
            self._values.append(_ones(len(self._keys)))
        self._keys.append(keys)
        if self._valued:
            self._values.append(_ones(len(keys)) if values is None else values)

    def take(self, valued: bool) -> tuple[np.ndarray, np.ndarray]:
        """Keys, and values if `valued`. The piece must not be used afterwards."""
        values = self._values.array() if self._valued else _ones(len(self._keys) if valued else 0)
        return self._keys.array(), values


class _Growing:
    """An array to append to. Grows in place if the allocator can."""

    def __init__(self, dtype: type) -> None:
        self._array: np.ndarray = np.empty(0, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, part: np.ndarray) -> None:
        need = self._size + len(part)
        if need > len(self._array):  # untouched pages use no memory; large blocks grow by remapping, without a copy
            self._array.resize(max(need, len(self._array) * 5 // 4), refcheck=False)
        self._array[self._size : need] = part
        self._size = need

    def array(self) -> np.ndarray:
        """The array, cut to its size. The object must not be used afterwards."""
        self._array.resize(self._size, refcheck=False)
        return self._array


def _check_ids(ids: np.ndarray, side: str, count: int, first_row: int) -> None:
    """Raise ValueError that names the first id that is not an integer in [0, count)."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{side} ids: expected one dimension of integers, got {ids.ndim} of {ids.dtype}")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= count):
        row = int(np.argmax((ids < 0) | (ids >= count)))
        raise ValueError(f"interaction {first_row + row}: {side} id {ids[row]}, expected 0 to {count - 1}")


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def _offsets(counts: np.ndarray) -> np.ndarray:
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _summed(keys: np.ndarray, values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Sorted distinct keys with the sums of their values. None stands for ones, if no key is repeated."""
    if values is None:
        keys.sort()
    else:
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    if first.all():
        return keys, values
    starts = np.flatnonzero(first)
    if values is None:
        return keys[starts], np.diff(starts, append=len(keys)).astype(np.float32)
    return keys[starts], np.add.reduceat(values, starts, dtype=np.float64).astype(np.float32)
