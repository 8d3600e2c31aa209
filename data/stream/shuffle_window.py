"""A shuffle window: the rows of consecutive batches, each written once to its place in its batch.

    decoded row group -> segments -> tiles --permute--> window (step, column, row) = batch after batch

A row group gives a window a *segment* of its rows per lane. A segment is cut into *tiles* (`order.EpochOrder.tiles`):
the rows of a tile are permuted at once, within the processor's cache, and then copied to the tile's slots in every
batch. A tile that two row groups share is staged until it is complete. This is the only way into a window, for any
world size, with and without shuffling. Writing row by row, without tiles, costs half of the reader's speed; writing
only incomplete tiles row by row, a fifth.

Columns of one type share a buffer in which a batch is (columns, rows): the layout of a KeyedJaggedTensor's values. A
batch is a view of its part, and the memory of a window returns to the pool with its last view.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from recpress.data.dataset.columns import Jagged, to_tensor
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.stream.order import TILE_ROWS, EpochOrder, Segment, ShuffleTile

Columns = dict[str, np.ndarray | Jagged]

_SPREAD = 32
"""Batches lie an odd multiple of this many elements apart: a multiple of a page would put all rows of a tile into a few
lines of the processor's cache."""


class Table(NamedTuple):
    """The columns of one type of a batch."""

    names: tuple[str, ...]
    values: torch.Tensor  # (columns, B)


class BufferPool:
    """Memory of shuffle windows for reuse: the kernel clears new memory first, which takes as long as filling it.

    `take` lends memory to a tensor. A finalizer returns it once neither the tensor nor any view of it is left, so a
    batch that is kept stays valid. Simpler designs cost more: batches that are copies 12 % of the reader's CPU time,
    new memory for each window 16 % (by `malloc` 8 %, and 1.6 times the memory: freed windows stay in heaps of threads).

    Args:
        pin_memory: page-locked memory, from which CUDA copies during the computation. Torch's own cache reuses it: it
            knows when a copy has ended.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory
        # By size. A finalizer may run in any thread at any time: appending to a deque and popping need no lock.
        self._free: dict[int, deque[np.ndarray]] = defaultdict(deque)

    def take(self, dtype: torch.dtype, elements: int) -> torch.Tensor:
        """An uninitialized tensor, (elements,). Safe to call from any thread."""
        if self._pin_memory:
            return torch.empty(elements, dtype=dtype, pin_memory=True)
        size = elements * dtype.itemsize
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = _mapped(size)
        owner = memory[:]
        weakref.finalize(owner, _give_back, weakref.ref(free), memory).atexit = False
        return torch.from_numpy(owner).view(dtype)


def _give_back(free: weakref.ref[deque[np.ndarray]], memory: np.ndarray) -> None:
    """Return memory to its pool, or to the system if the pool is gone: a kept batch must not keep all of the pool."""
    if (left := free()) is not None:
        left.append(memory)


def _mapped(size: int) -> np.ndarray:
    """Bytes from the system itself, which has them back with the array: malloc would leave them in a thread's heap."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:size]


@dataclass
class _Buffer:
    """The columns of one type of all batches of a window."""

    names: tuple[str, ...]
    flat: torch.Tensor
    stride: int
    """Elements from one batch to the next."""


@dataclass
class _StagedTile:
    """A tile of which some rows are missing."""

    columns: dict[str, torch.Tensor]
    """(at least the tile's rows,) each"""
    missing: int


class ShuffleWindow:
    """One rank's rows of a window, from the first row that is decoded to the last batch.

    Args:
        number: of the window in the epoch.
        columns: any decoded rows; they tell the types.
        missing: rows that the window waits for.
        pool: lends the window its memory.
    """

    def __init__(
        self,
        order: EpochOrder,
        number: int,
        rank: int,
        world: int,
        columns: Columns,
        missing: int,
        pool: BufferPool,
    ) -> None:
        self._order, self.missing, self._pool = order, missing, pool
        self._first_step, end = order.window_steps(number)
        self._full = end - self._first_step
        tail = order.full_steps
        self._sizes = [order.step_rows(step, world) for step in range(self._first_step, end)]
        self._lows = [rank * order.global_batch // world] * self._full  # first slot of the rank in the global batch
        if number == order.num_windows - 1:
            self._sizes.append(order.step_rows(tail, world))
            self._lows.append(order.first_position(tail, rank, world) - tail * order.global_batch)
        self._width = max(self._sizes)
        self._lock = threading.Lock()
        self._staged: dict[tuple[int, int], _StagedTile] = {}
        self._buffers: list[_Buffer] = []
        self._lists: dict[str, list[tuple[np.ndarray, Jagged]]] = {}
        self._ordered_lists: dict[str, tuple[Jagged, np.ndarray]] = {}
        by_type: dict[torch.dtype, list[str]] = {}
        for name, column in columns.items():
            if isinstance(column, Jagged):
                self._lists[name] = []
            else:
                by_type.setdefault(to_tensor(column[:0]).dtype, []).append(name)
        most_steps = -(-order.full_steps // order.num_windows) + 1  # the same size for all windows: memory fits
        for dtype, names in by_type.items():
            stride = _spread(len(names) * self._width)
            self._buffers.append(_Buffer(tuple(names), pool.take(dtype, most_steps * stride), stride))

    # ---- rows in

    def fill(self, segment: Segment, columns: Columns) -> None:
        """Write the rows of a segment of a decoded row group. Several threads may fill different segments."""
        rows = {
            name: to_tensor(column[segment.first : segment.first + segment.count])
            for name, column in columns.items()
            if not isinstance(column, Jagged)
        }
        for tile in self._order.tiles(segment.lane, segment.window, segment.offset, segment.count):
            if self._has_rows_of(tile):
                self._add(segment.lane, tile, rows)
        if self._lists:
            kept, places = self._places(segment)
            for name, pieces in self._lists.items():
                column = columns[name]
                assert isinstance(column, Jagged)
                if len(kept) == segment.count:
                    pieces.append((places, column.slice(segment.first, segment.first + segment.count)))
                else:
                    pieces.append((places, column.take(kept + segment.first)))

    def _has_rows_of(self, tile: ShuffleTile) -> bool:
        """Whether any row of the tile is in a batch of this rank, and not only of other ranks that share the lane."""
        full = self._full and _overlap(tile.slot, tile.width, self._lows[0], self._sizes[0])
        return bool(full or (tile.extra and _overlap(tile.tail_slot, tile.extra, self._lows[-1], self._sizes[-1])))

    def _add(self, lane: int, tile: ShuffleTile, rows: dict[str, torch.Tensor]) -> None:
        """Add rows of a tile; the last ones write it."""
        rows = {name: column[tile.first : tile.first + tile.count] for name, column in rows.items()}
        if tile.count == tile.rows:
            self._write(tile, rows)
            return
        with self._lock:
            staged = self._staged.get((lane, tile.number))
            if staged is None:
                capacity = -(-tile.rows // TILE_ROWS) * TILE_ROWS  # few different sizes
                empty = {name: self._pool.take(column.dtype, capacity) for name, column in rows.items()}
                staged = self._staged[lane, tile.number] = _StagedTile(empty, tile.rows)
        for name, column in rows.items():
            staged.columns[name][tile.begin : tile.begin + tile.count] = column
        with self._lock:
            staged.missing -= tile.count
            if staged.missing:
                return
            del self._staged[lane, tile.number]
        self._write(tile, {name: column[: tile.rows] for name, column in staged.columns.items()})

    def _write(self, tile: ShuffleTile, rows: dict[str, torch.Tensor]) -> None:
        """Permute all rows of a tile, and copy those of this rank to their slots in each batch."""
        index = torch.from_numpy(tile.index)
        for buffer in self._buffers:
            for number, name in enumerate(buffer.names):
                ordered = torch.index_select(rows[name], 0, index, out=_scratch(rows[name].dtype, tile.rows))
                full, tail = ordered[: tile.rows - tile.extra], ordered[tile.rows - tile.extra :]
                if self._full and (cut := _overlap(tile.slot, tile.width, self._lows[0], self._sizes[0])):
                    begin = number * self._width + cut.start - self._lows[0]
                    target = buffer.flat.as_strided((self._full, len(cut)), (buffer.stride, 1), begin)
                    target.copy_(full.view(self._full, tile.width)[:, cut.start - tile.slot : cut.stop - tile.slot])
                if tile.extra and (cut := _overlap(tile.tail_slot, tile.extra, self._lows[-1], self._sizes[-1])):
                    begin = self._full * buffer.stride + number * self._width + cut.start - self._lows[-1]
                    buffer.flat[begin : begin + len(cut)] = tail[cut.start - tile.tail_slot : cut.stop - tile.tail_slot]

    def _places(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a segment are in batches of this rank, and step of the window * width + row of the batch."""
        places = self._order.places(segment.lane, segment.window, segment.offset, segment.count)
        step, slot = np.divmod(places, self._order.global_batch)
        slot -= np.array(self._lows)[step]
        kept = np.flatnonzero((slot >= 0) & (slot < np.array(self._sizes)[step]))
        return kept, (step * self._width + slot)[kept]

    def finish(self) -> None:
        """Put lists in the order of the batches, once no row is missing."""
        while self._lists:
            name, pieces = self._lists.popitem()
            places = np.concatenate([place for place, _ in pieces])
            lengths = np.concatenate([column.lengths for _, column in pieces])
            values = np.concatenate([column.values for _, column in pieces])
            del pieces  # values are in memory twice, and not three times
            inverse = np.full(len(self._sizes) * self._width, -1)
            inverse[places] = np.arange(len(places))
            present = inverse >= 0  # a run that resumes within the window reads only the rows that it needs
            bounds = np.concatenate(([0], np.cumsum(present.reshape(-1, self._width).sum(1))))
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            self._ordered_lists[name] = Jagged(values, offsets).take(inverse[present]), bounds

    # ---- batches out

    @cached_property
    def _views(self) -> list[tuple[_Buffer, tuple[torch.Tensor, ...]]]:
        """Each buffer and its batches (columns, width): made for all batches at once, which is cheaper."""
        found = []
        for buffer in self._buffers:
            shape = (len(self._sizes), len(buffer.names), self._width)
            found.append((buffer, buffer.flat.as_strided(shape, (buffer.stride, self._width, 1)).unbind(0)))
        return found

    def batch(self, step: int) -> tuple[list[Table], dict[str, torch.Tensor | JaggedColumn], int]:
        """The rank's rows of a step: dense columns by type (views), all columns by name, and the number of rows."""
        place = step - self._first_step
        size = self._sizes[place]
        tables: list[Table] = []
        named: dict[str, torch.Tensor | JaggedColumn] = {}
        for buffer, batches in self._views:
            values = batches[place]
            if size < self._width:
                values = values[:, :size]
            tables.append(Table(buffer.names, values))
            named.update(zip(buffer.names, values.unbind(0), strict=True))
        for name, (column, bounds) in self._ordered_lists.items():
            offsets = column.offsets[bounds[place] : bounds[place + 1] + 1]
            values = torch.from_numpy(column.values[offsets[0] : offsets[-1]].copy())
            named[name] = JaggedColumn(values, torch.from_numpy(np.diff(offsets)))
        return tables, named, size


_LOCAL = threading.local()


def _scratch(dtype: torch.dtype, rows: int) -> torch.Tensor:
    """This thread's memory for one tile, (rows,): from `malloc`, tiles of all columns fragment the heaps."""
    found: torch.Tensor | None = getattr(_LOCAL, str(dtype), None)
    if found is None or len(found) < rows:
        found = torch.empty(max(rows, TILE_ROWS), dtype=dtype)
        setattr(_LOCAL, str(dtype), found)
    return found[:rows]


def _overlap(first: int, count: int, low: int, size: int) -> range:
    """What [first, first + count) and [low, low + size) have in common."""
    return range(max(first, low), max(first, low, min(first + count, low + size)))


def _spread(elements: int) -> int:
    if elements < 16 * _SPREAD:
        return elements
    return -(-elements // (2 * _SPREAD)) * 2 * _SPREAD + _SPREAD
