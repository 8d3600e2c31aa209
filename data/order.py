"""The order of the rows in an epoch: a pure function of (row counts, global batch size, seed, epoch).

1. The row groups that have rows in the sample are shuffled and laid end to end: the *line* of N rows.
2. The line is cut into L *lanes*, stretches of equal length. A batch takes an equal share from each lane.
3. A lane is cut into blocks of about buffer_rows / L rows, and the rows of a block are permuted.
4. Step k is the global batch of G = world * batch_size rows that takes the next G / L rows of every lane, in
   the order of the lanes; rank r has the rows [r * batch_size, (r + 1) * batch_size) of it.

Neither the rank, nor the number of ranks, nor where a run began is in 1 to 3: the rows of a step depend on
the global batch size alone, and a position is two integers, epoch and step. Since a rank's rows of each batch
come from its own lanes, ranks share the decoding: where the number of ranks divides that of the lanes, a row
group is decoded by one rank, or by those between which a cut lies. Where there are more ranks than lanes (and
there are never more lanes than row groups), the ranks of a lane all decode it.

Tail: the T = N mod G rows that remain make one last, smaller step with T // world rows on each rank, so that
all ranks have equal batches and end together; the fewer than `world` rows that cannot be dealt out evenly are
dropped from the epoch, others in each epoch. With one rank every row comes exactly once.

Without shuffling there is one lane and no permutation: the order of the files, decoded by every rank that
needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from recpress.data.sampling import key


@dataclass(frozen=True)
class Part:
    """Rows of one row group that belong to one block: rows [first, first + count) of the group's sample are,
    before the block's permutation, its rows from `offset` on."""

    lane: int
    block: int
    first: int
    offset: int
    count: int


@dataclass(frozen=True)
class Visit:
    """One row group to decode, the first step that needs it, and the blocks that its rows go to."""

    group: int
    step: int
    parts: list[Part] = field(default_factory=list)


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
    max_lanes: int = 8

    _known: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert min(self.global_batch, self.buffer_rows, self.max_lanes) > 0

    # ---- the line of row groups

    @cached_property
    def groups(self) -> np.ndarray:
        """Row groups that have rows, in the order of this epoch. int64"""
        groups = np.flatnonzero(self.counts)
        return self._generator("groups").permutation(groups) if self.shuffle else groups

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
        return min(self.max_lanes, max(1, len(self.groups))) if self.shuffle else 1

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

    def lane_rows(self, lane: int) -> int:
        return int(self._lane_starts[lane + 1] - self._lane_starts[lane])

    def slices(self, step: int, rank: int, world: int) -> list[tuple[int, int, int]]:
        """The rank's rows of a step as (lane, first, end): positions in the lane, in the batch's order."""
        tail = step >= self.full_steps
        return [
            (lane, step * share + low, step * share + high)
            for lane, share, low, high in self._ranges(rank, world, tail)
        ]

    def _ranges(self, rank: int, world: int, tail: bool) -> list[tuple[int, int, int, int]]:
        """Where a rank's rows of a batch come from: (lane, rows of it in a full batch, first, end)."""
        if (rank, world, tail) in self._known:
            return self._known[rank, world, tail]
        rows, cuts = (self._tail, self._tail_cuts) if tail else (self.global_batch, self._full_cuts)
        first = rank * rows // world
        end = first + rows // world
        found = []
        for lane in range(self.lanes):
            low, high = max(first, int(cuts[lane])), min(end, int(cuts[lane + 1]))
            if low < high:
                found.append((lane, int(self._share[lane]), low - int(cuts[lane]), high - int(cuts[lane])))
        self._known[rank, world, tail] = found
        return found

    # ---- blocks

    @cached_property
    def block_rows(self) -> int:
        return max(1, self.buffer_rows // self.lanes)

    def block_of(self, lane: int, position: int) -> int:
        """The block of the lane that holds a position."""
        first = self._first_block(lane)
        return 0 if position < first else 1 + (position - first) // self.block_rows

    def block_bounds(self, lane: int, block: int) -> tuple[int, int]:
        """The lane's positions [first, end) that a block holds."""
        head, rows = self._first_block(lane), self.lane_rows(lane)
        first = 0 if block == 0 else head + (block - 1) * self.block_rows
        return first, min(head + block * self.block_rows, rows)

    def _first_block(self, lane: int) -> int:
        # Lanes begin with blocks of different sizes, or all would need their next block at the same step.
        rows = self.lane_rows(lane)
        return rows if rows <= self.block_rows else max(1, self.block_rows * (lane + 1) // self.lanes)

    def _block_line(self, lane: int, block: int) -> tuple[int, int]:
        """The block's stretch of the line. Odd lanes run backwards: lanes that share the row group at their
        common cut then both need it at their beginning, or both at their end, and it is decoded once."""
        first, end = self.block_bounds(lane, block)
        if self.shuffle and lane % 2:
            low = int(self._lane_starts[lane + 1])
            return low - end, low - first
        low = int(self._lane_starts[lane])
        return low + first, low + end

    def permutation(self, lane: int, block: int) -> np.ndarray:
        """Place in the block of each of its rows: row k of its stretch of the line goes to place p[k]."""
        first, end = self.block_bounds(lane, block)
        if not self.shuffle:
            return np.arange(end - first)
        return self._generator("block", lane, block).permutation(end - first)

    # ---- what a rank decodes

    def visits(self, rank: int, world: int, start: int = 0) -> list[Visit]:
        """The row groups that a rank decodes from step `start` on, each once, in the order of need."""
        visits: dict[int, Visit] = {}
        parts = ((self._needed_at(lane, block, start), lane, block) for lane, block in self._blocks(rank, world, start))
        for step, lane, block in sorted(parts):
            low, high = self._block_line(lane, block)
            at = int(np.searchsorted(self._starts, low, side="right")) - 1
            while at < len(self.groups) and self._starts[at] < high:
                first, end = max(low, int(self._starts[at])), min(high, int(self._starts[at + 1]))
                group = int(self.groups[at])
                visit = visits.setdefault(group, Visit(group, step))
                visit.parts.append(Part(lane, block, first - int(self._starts[at]), first - low, end - first))
                at += 1
        return list(visits.values())

    def _needed_at(self, lane: int, block: int, start: int) -> int:
        share = int(self._share[lane])
        step = self.block_bounds(lane, block)[0] // share if share else self.full_steps
        return max(start, min(step, self.full_steps))

    def _blocks(self, rank: int, world: int, start: int) -> Iterator[tuple[int, int]]:
        """Blocks (lane, block) that hold rows which the rank reads from step `start` on."""
        full = {lane for lane, _, _ in self.slices(0, rank, world)} if start < self.full_steps else set()
        tail = {lane for lane, _, _ in self.slices(self.full_steps, rank, world)}
        for lane in sorted(full | tail):
            share, end = int(self._share[lane]), self.lane_rows(lane)
            low = (start if lane in full else self.full_steps) * share
            high = end if lane in tail else self.full_steps * share
            if low < high:
                last = self.block_of(lane, high - 1)
                yield from ((lane, block) for block in range(self.block_of(lane, low), last + 1))

    # ---- the definition, row by row: what the stream is tested against

    def locate(self, step: int, rank: int, world: int) -> np.ndarray:
        """The rank's rows of a step: (rows, 2) int64, row group and place in the group's sample."""
        found = [np.empty((0, 2), dtype=np.int64)]
        for lane, first, end in self.slices(step, rank, world):
            for block in range(self.block_of(lane, first), self.block_of(lane, end - 1) + 1):
                low, high = self.block_bounds(lane, block)
                back = np.argsort(self.permutation(lane, block))
                places = back[max(first, low) - low : min(end, high) - low]
                line = self._block_line(lane, block)[0] + places
                at = np.searchsorted(self._starts, line, side="right") - 1
                found.append(np.stack([self.groups[at], line - self._starts[at]], axis=1))
        return np.concatenate(found)

    def _generator(self, *place: int | str) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64(key("order", self.seed, self.epoch, *place)))
