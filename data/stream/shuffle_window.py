"""The memory of a round of batches: each row is written once, to its place in its batch.

Columns of one type share a buffer in which each batch is (columns, rows): what a KeyedJaggedTensor of these columns
holds, so that a batch is a view. Batches do not lie a multiple of a page apart: the places that a tile's rows go to
would share a few lines of the processor's cache.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from recpress.data.dataset.columns import Jagged, to_tensor
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.stream.order import TILE_ROWS, EpochOrder, Segment, ShuffleTile

Columns = dict[str, np.ndarray | Jagged]

_SPREAD = 32
"""Elements that batches lie apart besides, modulo twice as many."""
_LOCAL = threading.local()


def _scratch(use: str, kind: torch.dtype, rows: int) -> torch.Tensor:
    """Memory of the thread's own, for the rows of a tile."""
    if not hasattr(_LOCAL, "known"):
        _LOCAL.known = {}
    if len(_LOCAL.known.get((use, kind), ())) < rows:
        _LOCAL.known[use, kind] = torch.empty(max(rows, TILE_ROWS), dtype=kind)
    return _LOCAL.known[use, kind][:rows]


class Table(NamedTuple):
    """The columns of one type of a batch."""

    names: tuple[str, ...]
    values: torch.Tensor  # (columns, B)


@dataclass
class _Buffer:
    names: tuple[str, ...]
    flat: torch.Tensor
    stride: int
    """Elements from a batch to the next."""


@dataclass
class _Begun:
    """A tile of which a part has come."""

    memory: dict[str, torch.Tensor]
    """Of a tile or longer."""
    missing: int


class BufferPool:
    """Memory that is used again once no batch in it is left: new memory has to be cleared by the kernel first, which
    takes as long as filling it. Shared by threads.

    `take` lends memory. Its owner is an array that all tensors in that memory keep alive; the end of the array, with
    that of the last tensor, gives the memory back.

    Args:
        pin: page-locked memory, from which CUDA copies beside the computation. It is left to torch's own cache, which
            knows when a copy has ended.
    """

    def __init__(self, pin: bool = False) -> None:
        self._pin = pin
        self._lock = threading.Lock()
        # What is given back. Owners may end in any thread, also in one that holds the lock: a deque needs none.
        self._returned: deque[np.ndarray] = deque()
        self._free: list[np.ndarray] = []
        self._tiles: list[dict[str, torch.Tensor]] = []

    def take_tile(self, rows: int, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Memory for `rows` rows or more of columns with the names and types of `sources`, with anything in it."""
        with self._lock:
            tile = self._tiles.pop() if self._tiles else {}
        kept = {name: tile.get(name) for name in sources}
        if all(
            have is not None and have.dtype == sources[name].dtype and len(have) >= rows for name, have in kept.items()
        ):
            return tile
        return {name: torch.empty(max(rows, TILE_ROWS), dtype=column.dtype) for name, column in sources.items()}

    def give_tile(self, tile: dict[str, torch.Tensor]) -> None:
        """Which may be used again."""
        with self._lock:
            self._tiles.append(tile)

    def take(self, kind: np.dtype, elements: int) -> torch.Tensor:
        """A tensor of one dimension, with anything in it."""
        if self._pin:
            return torch.empty(elements, dtype=torch.from_numpy(np.empty(0, dtype=kind)).dtype, pin_memory=True)
        size = elements * kind.itemsize
        memory = self._fitting(size)
        owner = memory[:size].view(kind)
        weakref.finalize(owner, self._returned.append, memory).atexit = False
        return torch.from_numpy(owner)

    def _fitting(self, size: int) -> np.ndarray:
        """The smallest free memory of `size` bytes or more, else new."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            fitting = [place for place, memory in enumerate(self._free) if len(memory) >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda place: len(self._free[place])))
            self._free.clear()  # too small for the rounds of now
        return _mapped(size)


def _mapped(size: int) -> np.ndarray:
    """Bytes from the system itself, which gets them back with the array: the C library would keep them, in the heap of
    a thread that may be gone."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


class ShuffleWindow:
    """One rank's rows of a round, while they come in and until the last batch of it is given out.

    Args:
        columns: the first rows that came; they tell the types.
        missing: rows that have to come.
        spare: memory of rounds that are over.
    """

    def __init__(
        self,
        order: EpochOrder,
        number: int,
        rank: int,
        world: int,
        columns: Columns,
        missing: int,
        spare: BufferPool,
    ) -> None:
        self._order, self.missing, self._spare = order, missing, spare
        self._first_step, end = order.window_steps(number)
        self._full = end - self._first_step
        self._last = number == order.num_windows - 1
        tail = order.full_steps
        self._sizes = [order.step_rows(step, world) for step in range(self._first_step, end)]
        self._lows = [rank * order.global_batch // world] * self._full  # of the rank in the global batch
        if self._last:
            self._sizes.append(order.step_rows(tail, world))
            self._lows.append(order.first_position(tail, rank, world) - tail * order.global_batch)
        self._alone = world == 1
        self._width = max(self._sizes)
        self._lock = threading.Lock()
        self._tiles_begun: dict[tuple[int, int], _Begun] = {}
        self._buffers: list[_Buffer] = []
        self._lists: dict[str, list[tuple[np.ndarray, Jagged]]] = {}
        self._done: dict[str, tuple[Jagged, np.ndarray]] = {}
        by_type: dict[np.dtype, list[str]] = {}
        for name, column in columns.items():
            if isinstance(column, Jagged):
                self._lists[name] = []
            else:
                by_type.setdefault(column.dtype, []).append(name)
        for kind, names in by_type.items():
            stride = _spread(len(names) * self._width)
            self._buffers.append(_Buffer(tuple(names), spare.take(kind, len(self._sizes) * stride), stride))

    # ---- rows that come in

    def fill(self, part: Segment, columns: Columns) -> None:
        """Writes the rows of a part. Parts of several threads are for different places."""
        rows = {
            name: column[part.first : part.first + part.count]
            for name, column in columns.items()
            if not isinstance(column, Jagged)
        }
        if self._order.shuffle:
            sources = {name: to_tensor(column) for name, column in rows.items()}
            if self._whole(part.lane):
                for tile in self._order.tiles(part.lane, part.window, part.offset, part.count):
                    if tile.count == tile.rows:
                        self._gather(tile, sources)
                    else:
                        self._collect(part.lane, tile, sources)
            else:
                for buffer in self._buffers:
                    self._scatter(part, buffer, sources)
        else:
            for buffer in self._buffers:
                self._copy(part, buffer, rows)
        if self._lists:
            kept, places = self._mine(part, self._width)
            for name, pieces in self._lists.items():
                column = columns[name]
                assert isinstance(column, Jagged)
                whole = len(kept) == part.count
                mine = column.slice(part.first, part.first + part.count) if whole else column.take(kept + part.first)
                pieces.append((places, mine))

    def _whole(self, lane: int) -> bool:
        """Whether all rows of the lane in this round are the rank's."""
        low, high = self._order.lane_slots(lane)
        inside = self._lows[0] <= low and high <= self._lows[0] + self._sizes[0]
        return self._alone or (inside and not self._last)

    def _gather(self, tile: ShuffleTile, sources: dict[str, torch.Tensor], near: bool = False) -> None:
        """Writes a whole tile: into the processor's cache (unless it is `near`), there in its new order, and to its
        stretch of each batch."""
        index, low = torch.from_numpy(tile.index), 0 if self._alone else self._lows[0]
        for buffer in self._buffers:
            for number, name in enumerate(buffer.names):
                source = sources[name][tile.first : tile.first + tile.count]
                if not near:  # in its own order, which is faster than in another
                    source = _scratch("near", source.dtype, tile.count).copy_(source)
                ordered = _scratch("ordered", source.dtype, tile.count)
                torch.index_select(source, 0, index, out=ordered)
                begin = number * self._width - low
                target = buffer.flat.as_strided((self._full, tile.width), (buffer.stride, 1), begin + tile.slot)
                target.copy_(ordered[: tile.rows - tile.extra].view(self._full, tile.width))
                if tile.extra:
                    begin += self._full * buffer.stride + tile.tail_slot
                    buffer.flat[begin : begin + tile.extra] = ordered[tile.rows - tile.extra :]

    def _collect(self, lane: int, tile: ShuffleTile, sources: dict[str, torch.Tensor]) -> None:
        """Keeps rows of a tile that a row group has a part of, until all are there."""
        with self._lock:
            held = self._tiles_begun.get((lane, tile.number))
            if held is None:
                held = _Begun(self._spare.take_tile(tile.rows, sources), tile.rows)
                self._tiles_begun[lane, tile.number] = held
        for name, column in sources.items():
            held.memory[name][tile.begin : tile.begin + tile.count] = column[tile.first : tile.first + tile.count]
        with self._lock:
            held.missing -= tile.count
            if held.missing:
                return
            del self._tiles_begun[lane, tile.number]
        self._gather(replace(tile, first=0, count=tile.rows), held.memory, near=True)
        self._spare.give_tile(held.memory)

    def _scatter(self, part: Segment, buffer: _Buffer, sources: dict[str, torch.Tensor]) -> None:
        """Writes the rank's rows of a lane that it shares with other ranks."""
        rows, places = self._mine(part, buffer.stride)
        kept, index = torch.from_numpy(rows), torch.from_numpy(places)
        for number, name in enumerate(buffer.names):
            source = sources[name][kept]
            begin = number * self._width
            target = buffer.flat.narrow(0, begin, len(buffer.flat) - begin)
            target.scatter_(0, index, source if source.dtype == target.dtype else source.to(target.dtype))

    def _mine(self, part: Segment, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a part are the rank's, and the addresses that they go to."""
        batch = self._order.global_batch
        places = self._order.places(part.lane, part.window, part.offset, part.count)
        step, slot = np.divmod(places, batch)
        slot -= np.array(self._lows)[step]
        kept = np.flatnonzero((slot >= 0) & (slot < np.array(self._sizes)[step]))
        return kept, (step * stride + slot)[kept]

    def _copy(self, part: Segment, buffer: _Buffer, rows: dict[str, np.ndarray]) -> None:
        """Without shuffling: what goes to a batch lies together."""
        batch, end = self._order.global_batch, part.offset + part.count
        flat = buffer.flat.numpy()
        for step in range(part.offset // batch, -(-end // batch)):
            low = step * batch + self._lows[step]
            first, last = max(part.offset, low), min(end, low + self._sizes[step])
            if first < last:
                target = step * buffer.stride + first - low
                for number, name in enumerate(buffer.names):
                    begin = target + number * self._width
                    flat[begin : begin + last - first] = rows[name][first - part.offset : last - part.offset]

    def finish(self) -> None:
        """Once nothing is missing: puts lists in their order."""
        while self._lists:
            name, pieces = self._lists.popitem()
            places = np.concatenate([place for place, _ in pieces])
            lengths = np.concatenate([column.lengths for _, column in pieces])
            values = np.concatenate([column.values for _, column in pieces])
            del pieces  # values are in memory twice, and not three times
            inverse = np.full(len(self._sizes) * self._width, -1)
            inverse[places] = np.arange(len(places))
            come = inverse >= 0  # of a run that begins in the middle not all
            bounds = np.concatenate(([0], np.cumsum(come.reshape(-1, self._width).sum(1))))
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            self._done[name] = Jagged(values, offsets).take(inverse[come]), bounds

    # ---- batches that go out

    @cached_property
    def _views(self) -> list[tuple[_Buffer, tuple[torch.Tensor, ...], list[tuple[torch.Tensor, ...]]]]:
        """Of each buffer, its batches whole and column by column: made for all batches at once, which is cheaper."""
        found = []
        for buffer in self._buffers:
            shape = (len(self._sizes), len(buffer.names), self._width)
            whole = buffer.flat.as_strided(shape, (buffer.stride, self._width, 1))
            columns = [column.unbind(0) for column in whole.unbind(1)]
            found.append((buffer, whole.unbind(0), columns))
        return found

    def batch(self, step: int) -> tuple[list[Table], dict[str, torch.Tensor | JaggedColumn], int]:
        """The rank's rows of a step: the dense columns by type, all columns by name, and how many rows."""
        place = step - self._first_step
        size = self._sizes[place]
        tables = []
        named: dict[str, torch.Tensor | JaggedColumn] = {}
        for buffer, whole, single in self._views:
            values = whole[place]
            if size == self._width:
                for name, batches in zip(buffer.names, single, strict=True):
                    named[name] = batches[place]
            else:
                values = values[:, :size]
                named.update(zip(buffer.names, values.unbind(0), strict=True))
            tables.append(Table(buffer.names, values))
        for name, (column, bounds) in self._done.items():
            offsets = column.offsets[bounds[place] : bounds[place + 1] + 1]
            named[name] = JaggedColumn(
                torch.from_numpy(column.values[offsets[0] : offsets[-1]]), torch.from_numpy(np.diff(offsets))
            )
        return tables, named, size


def _spread(elements: int) -> int:
    if elements < 16 * _SPREAD:
        return elements
    return -(-elements // (2 * _SPREAD)) * 2 * _SPREAD + _SPREAD
