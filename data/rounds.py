"""The memory of a round of batches: each row is written once, to its place in its batch.

Columns of one type share a buffer in which each batch is (columns, rows): what a KeyedJaggedTensor of these columns
holds, so that a batch is a view. Batches do not lie a multiple of a page apart: the places that a tile's rows go to
would share a few lines of the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from recpress.data.columns import Jagged
from recpress.data.order import EpochOrder, Part
from recpress.data.side_table import JaggedColumn

Columns = dict[str, np.ndarray | Jagged]

_SPREAD = 32
"""Elements that batches lie apart besides, modulo twice as many."""


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


class Round:
    """One rank's rows of a round, while they come in and until the last batch of it is given out.

    Args:
        columns: the first rows that came; they tell the types.
        missing: rows that have to come.
    """

    def __init__(self, order: EpochOrder, number: int, rank: int, world: int, columns: Columns, missing: int) -> None:
        self._order, self._number, self.missing = order, number, missing
        self._first_step, end = order.round_steps(number)
        self._full = end - self._first_step
        self._last = number == order.num_rounds - 1
        tail = order.full_steps
        self._sizes = [order.step_rows(step, world) for step in range(self._first_step, end)]
        self._lows = [rank * order.global_batch // world] * self._full  # of the rank in the global batch
        if self._last:
            self._sizes.append(order.step_rows(tail, world))
            self._lows.append(order.first_position(tail, rank, world) - tail * order.global_batch)
        self._alone = world == 1
        self._width = max(self._sizes)
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
            flat = np.empty(len(self._sizes) * stride, dtype=kind)
            self._buffers.append(_Buffer(tuple(names), torch.from_numpy(flat), stride))

    # ---- rows that come in

    def fill(self, part: Part, columns: Columns) -> None:
        """Writes the rows of a part. Parts of several threads are for different places."""
        rows = {
            name: column[part.first : part.first + part.count]
            for name, column in columns.items()
            if not isinstance(column, Jagged)
        }
        for buffer in self._buffers:
            if self._order.shuffle:
                self._scatter(part, buffer, rows)
            else:
                self._copy(part, buffer, rows)
        if self._lists:
            kept, places = self._mine(part, self._width)
            for name, pieces in self._lists.items():
                column = columns[name]
                assert isinstance(column, Jagged)
                pieces.append((places, column.take(kept + part.first)))

    def _scatter(self, part: Part, buffer: _Buffer, rows: dict[str, np.ndarray]) -> None:
        kept, places = None, None
        low, high = self._order.lane_slots(part.lane)
        inside = self._lows[0] <= low and high <= self._lows[0] + self._sizes[0]
        if self._alone or (inside and not self._last):
            places = self._order.places(
                part.lane, part.round, part.offset, part.count, buffer.stride, 0 if self._alone else self._lows[0]
            )
        else:
            kept, places = self._mine(part, buffer.stride)
        index = torch.from_numpy(places)
        for number, name in enumerate(buffer.names):
            source = _tensor(rows[name] if kept is None else rows[name][kept])
            begin = number * self._width
            target = buffer.flat.narrow(0, begin, len(buffer.flat) - begin)
            target.scatter_(0, index, source if source.dtype == target.dtype else source.to(target.dtype))

    def _mine(self, part: Part, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a part are the rank's, and the addresses that they go to."""
        batch = self._order.global_batch
        places = self._order.places(part.lane, part.round, part.offset, part.count, batch)
        step, slot = np.divmod(places, batch)
        slot -= np.array(self._lows)[step]
        kept = np.flatnonzero((slot >= 0) & (slot < np.array(self._sizes)[step]))
        return kept, (step * stride + slot)[kept]

    def _copy(self, part: Part, buffer: _Buffer, rows: dict[str, np.ndarray]) -> None:
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
        for name, pieces in self._lists.items():
            places = np.concatenate([place for place, _ in pieces])
            lengths = np.concatenate([column.lengths for _, column in pieces])
            values = np.concatenate([column.values for _, column in pieces])
            inverse = np.full(len(self._sizes) * self._width, -1)
            inverse[places] = np.arange(len(places))
            come = inverse >= 0  # of a run that begins in the middle not all
            bounds = np.concatenate(([0], np.cumsum(come.reshape(-1, self._width).sum(1))))
            offsets = np.concatenate(([0], np.cumsum(lengths)))
            self._done[name] = Jagged(values, offsets).take(inverse[come]), bounds
        self._lists = {}

    # ---- batches that go out

    @cached_property
    def _views(self) -> list[tuple[torch.Tensor, ...]]:
        """Of each buffer, its batches."""
        found = []
        for names, flat, stride in ((b.names, b.flat, b.stride) for b in self._buffers):
            shape = (len(self._sizes), len(names), self._width)
            found.append(flat.as_strided(shape, (stride, self._width, 1)).unbind(0))
        return found

    def batch(self, step: int) -> tuple[list[Table], dict[str, JaggedColumn], int]:
        """The rank's rows of a step: columns by type, lists by name, and how many rows."""
        place = step - self._first_step
        size = self._sizes[place]
        tables = []
        for buffer, views in zip(self._buffers, self._views, strict=True):
            values = views[place]
            tables.append(Table(buffer.names, values if size == self._width else values[:, :size]))
        lists = {}
        for name, (column, bounds) in self._done.items():
            offsets = column.offsets[bounds[place] : bounds[place + 1] + 1]
            lists[name] = JaggedColumn(
                torch.from_numpy(column.values[offsets[0] : offsets[-1]]), torch.from_numpy(np.diff(offsets))
            )
        return tables, lists, size


def _spread(elements: int) -> int:
    if elements < 16 * _SPREAD:
        return elements
    return -(-elements // (2 * _SPREAD)) * 2 * _SPREAD + _SPREAD


class _Writable:
    """Arrow's memory is read-only, of which torch warns; here torch only reads it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
