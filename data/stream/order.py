"""The order of the rows in an epoch: a pure function of (row counts, global batch size, seed, epoch).

1. The row groups that have rows in the sample are shuffled and laid end to end: the *line* of N rows.
2. The line is cut into L *lanes*, segments of equal length. A batch takes an equal share from each lane.
3. The steps are grouped into equal *shuffle windows* of about buffer_rows rows. A window takes the next rows of each
   lane, its *block*.
4. A block is cut into *tiles* of about TILE_ROWS rows, each of which gives the same number of rows to every step of
   the window: which ones, and where in the batch, is a permutation (`recpress.data.stream.shuffle`).
5. Step k is the global batch of G = world * batch_size rows, in it the lanes, in them the tiles, one after the other;
   rank r has the rows [r * batch_size, (r + 1) * batch_size) of it.

Neither the rank, nor the number of ranks, nor where a run began is in 1 to 4: the rows of a step depend on
the global batch size alone, and a position is two integers, epoch and step. Since a rank's rows of each batch
come from its own lanes, ranks share the decoding: where the number of ranks divides that of the lanes, a row
group is decoded by one rank, or by those between which a cut lies. Where there are more ranks than lanes (and
there are never more lanes than row groups), the ranks of a lane all decode it.

So a batch is a stratified sample of a window: the same number of rows from each lane and tile, uniform within a tile. A
log that fits in one tile is permuted uniformly.

Tail: the T = N mod G rows that remain make one last, smaller step with T // world rows on each rank, so that
all ranks have equal batches and end together; the fewer than `world` rows that cannot be dealt out evenly are
dropped from the epoch, others in each epoch. Its rows are drawn from the last window. With one rank every row comes
exactly once.

Without shuffling there is one lane and no permutation: the order of the files, decoded by every rank that
needs it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from recpress.data.seeds import philox
from recpress.data.stream.shuffle import Pool, members

ORDER_VERSION = 2
"""Changes with the order: a run cannot resume with another version."""
TILE_ROWS = 1 << 15
"""Rows that a tile has at most, unless a window has more steps: small enough for a processor's cache."""
_PLAIN_ROWS = 1 << 17
"""Rows of a window without shuffling, at most."""
_STEPS = 1 << 16
"""Steps of a window, at most."""


@dataclass(frozen=True)
class Segment:
    """Rows of one row group that belong to one block: rows [first, first + count) of the group's sample are
    the block's rows from `offset` on."""

    lane: int
    window: int
    first: int
    offset: int
    count: int


@dataclass(frozen=True)
class RowGroupRead:
    """One row group to decode, the first step that needs it, and the segments of its rows, one per block."""

    group: int
    step: int
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class ShuffleTile:
    """Rows of a block that lie in one tile."""

    first: int
    """Of the rows that were asked for."""
    count: int
    number: int
    """Of the tile in the block."""
    begin: int
    """Place of the first row in the tile."""
    rows: int
    """Of the whole tile."""
    slot: int
    """Place in the global batch from which on the tile gives `width` rows to each full step of the window."""
    width: int
    extra: int
    """Rows for the smaller last step, from `tail_slot` on."""
    tail_slot: int
    index: np.ndarray
    """Which row of the tile is the k-th, step by step. (rows,) int64"""


class _Block(NamedTuple):
    """The tiles of a block: each list has a number for each of them, and where the last one ends."""

    starts: list[int]  # in the block
    slots: list[int]  # in the global batch
    tail_slots: list[int]  # in the smaller last one
    bits: list[int]  # two random numbers a tile


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch. Everything here is arithmetic on row counts; no data is read."""

    counts: np.ndarray
    """Rows in the sample of each row group, in the order of the files. (groups,) int64"""
    global_batch: int
    """Rows of a step on all ranks together."""
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    buffer_rows: int = 1 << 20
    interleave: int = 8

    _known_ranges: dict = field(default_factory=dict, repr=False, compare=False)
    _known_blocks: dict = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def pool(self) -> Pool:
        return Pool(self.seed, self.epoch)

    def __post_init__(self) -> None:
        assert min(self.global_batch, self.buffer_rows, self.interleave) > 0

    # ---- the line of row groups

    @cached_property
    def groups(self) -> np.ndarray:
        """Row groups that have rows, in the order of this epoch. int64"""
        groups = np.flatnonzero(self.counts)
        if not self.shuffle:
            return groups
        keys = philox("groups", self.seed, self.epoch).random_raw(len(groups))
        return groups[np.argsort(keys, kind="stable")]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each of `groups` begins on the line, and the line's end."""
        return np.concatenate(([0], np.cumsum(self.counts[self.groups], dtype=np.int64)))

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    # ---- steps

    @property
    def full_steps(self) -> int:
        return self.num_rows // self.global_batch

    @property
    def _tail(self) -> int:
        return self.num_rows % self.global_batch

    def step_rows(self, step: int, world: int) -> int:
        """Rows of a step on each rank."""
        return (self.global_batch if step < self.full_steps else self._tail) // world

    def first_position(self, step: int, rank: int, world: int) -> int:
        """Place in the epoch of the first of the rank's rows of a step; the others follow it."""
        rows = self.global_batch if step < self.full_steps else self._tail
        return step * self.global_batch + rank * rows // world

    def num_steps(self, world: int) -> int:
        """Steps of the epoch, the smaller last one included."""
        return self.full_steps + (self.step_rows(self.full_steps, world) > 0)

    # ---- lanes

    @cached_property
    def lanes(self) -> int:
        return min(self.interleave, max(1, len(self.groups))) if self.shuffle else 1

    def _cuts(self, rows: int) -> np.ndarray:
        """How `rows` rows of a batch are shared among the lanes: lane l has [cuts[l], cuts[l + 1])."""
        return np.arange(self.lanes + 1, dtype=np.int64) * rows // self.lanes

    @cached_property
    def _full_cuts(self) -> np.ndarray:
        return self._cuts(self.global_batch)

    @cached_property
    def _tail_cuts(self) -> np.ndarray:
        return self._cuts(self._tail)

    @cached_property
    def _share(self) -> np.ndarray:
        """Rows that each lane gives to a full batch."""
        return np.diff(self._full_cuts)

    @cached_property
    def _lane_starts(self) -> np.ndarray:
        """Where each lane begins on the line, and the line's end."""
        rows = self.full_steps * self._share + np.diff(self._tail_cuts)
        return np.concatenate(([0], np.cumsum(rows)))

    def slices(self, step: int, rank: int, world: int) -> list[tuple[int, int, int]]:
        """The rank's rows of a step as (lane, first, end): positions in the lane, in the batch's order."""
        tail = step >= self.full_steps
        return [
            (lane, step * share + low, step * share + high)
            for lane, share, low, high in self._ranges(rank, world, tail)
        ]

    def _ranges(self, rank: int, world: int, tail: bool) -> list[tuple[int, int, int, int]]:
        """Where a rank's rows of a batch come from: (lane, rows of it in a full batch, first, end)."""
        if (found := self._known_ranges.get((rank, world, tail))) is not None:
            return found
        rows, cuts = (self._tail, self._tail_cuts) if tail else (self.global_batch, self._full_cuts)
        first = rank * rows // world
        end = first + rows // world
        found = []
        for lane in range(self.lanes):
            low, high = max(first, int(cuts[lane])), min(end, int(cuts[lane + 1]))
            if low < high:
                found.append((lane, int(self._share[lane]), low - int(cuts[lane]), high - int(cuts[lane])))
        self._known_ranges[rank, world, tail] = found
        return found

    # ---- shuffle windows

    @cached_property
    def num_windows(self) -> int:
        rows = self.buffer_rows if self.shuffle else min(self.buffer_rows, _PLAIN_ROWS)
        longest = max(1, min(_STEPS, rows // self.global_batch))
        return max(1, -(-self.full_steps // longest))

    def window_steps(self, number: int) -> tuple[int, int]:
        """Full steps [first, end) of a window. The last window also has the rows of the smaller last step."""
        return tuple(self.full_steps * k // self.num_windows for k in (number, number + 1))  # type: ignore[return-value]

    def window_of(self, step: int) -> int:
        if step >= self.full_steps:
            return self.num_windows - 1
        return ((step + 1) * self.num_windows - 1) // self.full_steps

    @cached_property
    def window_rows(self) -> int:
        """Rows of a window on all ranks, at most."""
        return -(-self.full_steps // self.num_windows) * self.global_batch + self._tail

    def _tail_of(self, lane: int, number: int) -> int:
        """Rows of the last, smaller step in a block."""
        return int(np.diff(self._tail_cuts)[lane]) if number == self.num_windows - 1 else 0

    def block_bounds(self, lane: int, number: int) -> tuple[int, int]:
        """Positions [first, end) of the lane that are in a window."""
        first, end = (step * int(self._share[lane]) for step in self.window_steps(number))
        return first, end + self._tail_of(lane, number)

    def _block_line(self, lane: int, number: int) -> tuple[int, int]:
        """The block's rows of the line. Odd lanes run backwards: lanes that share the row group at their
        common cut then both need it at their beginning, or both at their end, and it is decoded once."""
        first, end = self.block_bounds(lane, number)
        if self.shuffle and lane % 2:
            low = int(self._lane_starts[lane + 1])
            return low - end, low - first
        low = int(self._lane_starts[lane])
        return low + first, low + end

    # ---- where the rows of a block go

    def places(self, lane: int, number: int, first: int, count: int) -> np.ndarray:
        """Where the rows [first, first + count) of a block go: step of the window * global_batch + place in the global
        batch. (count,) int64

        The step after the window's full ones is the smaller last step of the epoch.
        """
        places = np.empty(count, dtype=np.int64)
        begin, end = self.window_steps(number)
        block = self._block(lane, number)
        tile = bisect.bisect_right(block.starts, first) - 1
        while tile < len(block.starts) - 1 and block.starts[tile] < first + count:
            at, after = block.starts[tile], block.starts[tile + 1]
            slot, width = block.slots[tile], block.slots[tile + 1] - block.slots[tile]
            extra, rows = block.tail_slots[tile + 1] - block.tail_slots[tile], after - at
            one, other = max(at, first), min(after, first + count)
            if one < other:
                grid = self.pool.grid(end - begin, width, extra, self.global_batch)
                turned = np.arange(one - at, other - at)
                if block.bits:
                    member, turn = block.bits[2 * tile] % members(rows), block.bits[2 * tile + 1] % rows
                    turned = (self.pool.permutation(rows, member)[turned] + turn) % rows
                last = turned >= (end - begin) * width  # of the smaller last step
                places[one - first : other - first] = grid[turned] + np.where(last, block.tail_slots[tile], slot)
            tile += 1
        return places

    def tiles(self, lane: int, number: int, first: int, count: int) -> Iterator[ShuffleTile]:
        """The rows [first, first + count) of a block, tile by tile: the inverse of `places`."""
        block = self._block(lane, number)
        tile = bisect.bisect_right(block.starts, first) - 1
        at, end = first, first + count
        while at < end:
            begin, after = block.starts[tile], block.starts[tile + 1]
            slot, width, rows = block.slots[tile], block.slots[tile + 1] - block.slots[tile], after - begin
            tail, extra = block.tail_slots[tile], block.tail_slots[tile + 1] - block.tail_slots[tile]
            if block.bits:
                index = self.pool.sources(rows, block.bits[2 * tile] % members(rows), block.bits[2 * tile + 1] % rows)
            else:
                index = np.arange(rows)
            yield ShuffleTile(at - first, min(after, end) - at, tile, at - begin, rows, slot, width, extra, tail, index)
            at, tile = min(after, end), tile + 1

    def _block(self, lane: int, number: int) -> _Block:
        if (found := self._known_blocks.get((lane, number))) is None:
            begin, end = self.window_steps(number)
            steps, share, tail = end - begin, int(self._share[lane]), self._tail_of(lane, number)
            tiles = max(1, min(share, -(-steps * share // TILE_ROWS))) if self.shuffle else 1
            cuts, tail_cuts = (np.arange(tiles + 1) * rows // tiles for rows in (share, tail))
            bits = philox("block", self.seed, self.epoch, lane, number).random_raw(2 * tiles) if self.shuffle else None
            found = _Block(
                starts=(steps * cuts + tail_cuts).tolist(),
                slots=(int(self._full_cuts[lane]) + cuts).tolist(),
                tail_slots=(int(self._tail_cuts[lane]) + tail_cuts).tolist(),
                bits=[] if bits is None else bits.tolist(),
            )
            if len(self._known_blocks) > 1000:
                self._known_blocks.clear()
            self._known_blocks[lane, number] = found
        return found

    # ---- what a rank decodes

    def reads(self, rank: int, world: int, start: int = 0) -> list[RowGroupRead]:
        """The row groups that a rank decodes from step `start` on, each once, in the order of use."""
        reads: dict[int, RowGroupRead] = {}
        for number in range(self.window_of(start), self.num_windows):
            step = max(start, self.window_steps(number)[0])
            for lane in self._lanes_of(rank, world, number, start):
                low, high = self._block_line(lane, number)
                at = int(np.searchsorted(self._starts, low, side="right")) - 1
                while at < len(self.groups) and self._starts[at] < high:
                    first, end = max(low, int(self._starts[at])), min(high, int(self._starts[at + 1]))
                    group = int(self.groups[at])
                    read = reads.setdefault(group, RowGroupRead(group, step))
                    read.segments.append(Segment(lane, number, first - int(self._starts[at]), first - low, end - first))
                    at += 1
        return list(reads.values())

    def _lanes_of(self, rank: int, world: int, number: int, start: int) -> list[int]:
        """Lanes of which a rank has rows in a window, from step `start` on."""
        found: set[int] = set()
        if max(start, self.window_steps(number)[0]) < self.window_steps(number)[1]:
            found |= {lane for lane, _, _ in self.slices(0, rank, world)}
        if number == self.num_windows - 1 and start < self.num_steps(world):
            found |= {lane for lane, _, _ in self.slices(self.full_steps, rank, world)}
        return sorted(found)

    # ---- the definition, row by row: what the stream is tested against

    def locate(self, step: int, rank: int, world: int) -> np.ndarray:
        """The rank's rows of a step: (rows, 2) int64, row group and place in the group's sample."""
        number = self.window_of(step)
        step_of_window = step - self.window_steps(number)[0]
        first = self.first_position(step, rank, world) - step * self.global_batch
        found = [np.empty((0, 2), dtype=np.int64)]
        for lane, _, _ in self.slices(step, rank, world):
            low, high = self._block_line(lane, number)
            places = self.places(lane, number, 0, high - low) - step_of_window * self.global_batch
            mine = np.flatnonzero((places >= first) & (places < first + self.step_rows(step, world)))
            line = low + mine[np.argsort(places[mine])]
            at = np.searchsorted(self._starts, line, side="right") - 1
            found.append(np.stack([self.groups[at], line - self._starts[at]], axis=1))
        return np.concatenate(found)
