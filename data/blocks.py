"""Background reading: threads decode row groups and deal their rows out to the blocks of an epoch's order.

A thread decodes a whole row group with Arrow's own threads off (the fastest way that was measured), and
writes each column straight to its permuted place in the block. A block is ready once it has all of its rows.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from recpress.data.columns import Jagged, take
from recpress.data.order import EpochOrder, Part, Visit
from recpress.data.rows import Rows
from recpress.data.selection import Selection

Columns = dict[str, np.ndarray | Jagged]


@dataclass
class _Block:
    """A block that is being filled. `places[k]` is where row k of its stretch of the line goes; None: k."""

    places: np.ndarray | None
    missing: int
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, list[tuple[np.ndarray, Jagged]]] = field(default_factory=dict)

    def fill(self, part: Part, columns: Columns) -> None:
        """Writes the rows of a part. Parts of several threads are for different places."""
        stretch = slice(part.offset, part.offset + part.count)
        places = stretch if self.places is None else self.places[stretch]
        for name, column in columns.items():
            if isinstance(column, Jagged):
                offsets = column.offsets[part.first : part.first + part.count + 1]
                piece = Jagged(column.values[offsets[0] : offsets[-1]], offsets - offsets[0])
                self.lists[name].append((np.arange(stretch.start, stretch.stop), piece))
            else:
                self.dense[name][places] = column[part.first : part.first + part.count]

    def finish(self) -> Columns:
        """The rows in their final order."""
        done: Columns = dict(self.dense)
        for name, parts in self.lists.items():
            rows = np.concatenate([place for place, _ in parts])
            order = np.empty_like(rows)
            order[rows if self.places is None else self.places[rows]] = np.arange(len(rows))
            lengths = np.concatenate([jagged.lengths for _, jagged in parts])
            values = np.concatenate([jagged.values for _, jagged in parts])
            done[name] = Jagged(values, np.concatenate(([0], np.cumsum(lengths)))).take(order)
        return done


class BlockReader:
    """Reads the blocks that one rank needs, ahead of their use, in threads of its own.

    Holds about `buffer_rows` rows, and in addition one row group's sampled rows for each of the rank's lanes.
    `close` (or leaving the `with`) ends the threads; an error in a thread is raised by the next `block`.
    """

    def __init__(
        self,
        rows: Rows,
        columns: Sequence[str],
        order: EpochOrder,
        visits: Sequence[Visit],
        *,
        selection: Selection,
        threads: int,
        start: int,
    ) -> None:
        self._rows, self._columns, self._order = rows, list(columns), order
        self._selection = selection
        self._visits = visits
        self._next = 0
        self._step = start
        self._changed = threading.Condition()
        self._filling: dict[tuple[int, int], _Block] = {}
        self._ready: dict[tuple[int, int], Columns] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._held = 0  # rows decoded or being decoded and not yet released
        self._floor: dict[int, int] = {}  # lane -> its first block that is still wanted
        lanes = {part.lane for visit in visits for part in visit.parts}
        largest = max((int(order.counts[visit.group]) for visit in visits), default=0)
        self._limit = order.buffer_rows + len(lanes) * largest
        self._threads = [
            threading.Thread(target=self._run, name=f"recpress-stream-{k}", daemon=True) for k in range(threads)
        ]

    def __enter__(self) -> BlockReader:
        atexit.register(self.close)  # Arrow must not be at work when the interpreter goes
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, after the row groups that they are decoding."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._ready.clear()
        self._filling.clear()
        atexit.unregister(self.close)

    # ---- the consumer

    def check(self) -> None:
        """Raises what a thread has raised."""
        if self._error is not None:
            raise self._error

    def block(self, lane: int, block: int, step: int) -> Columns:
        """The rows of a block, which step `step` needs; waits for it. Raises what a thread has raised."""
        with self._changed:
            self._step = step
            if (lane, block) not in self._ready:
                self._changed.notify_all()
            while (lane, block) not in self._ready:
                self.check()
                assert not self._closed
                self._changed.wait()
            return self._ready[lane, block]

    def release(self, lane: int, block: int) -> None:
        """Forgets the blocks of a lane before this one, also those that are not read yet."""
        with self._changed:
            self._floor[lane] = block
            for place in [place for place in self._ready if place[0] == lane and place[1] < block]:
                self._drop(*place)

    def _drop(self, lane: int, block: int) -> None:
        self._ready.pop((lane, block), None)
        low, high = self._order.block_bounds(lane, block)
        self._held -= high - low
        self._changed.notify_all()

    # ---- the threads

    def _run(self) -> None:
        while (visit := self._take()) is not None:
            try:
                self._decode(visit)
            except BaseException as error:  # to the consumer, whatever it is
                error.add_note(f"while reading {self._rows.where(self._rows.groups[visit.group])}")
                with self._changed:
                    self._error = self._error or error
                    self._closed = True
                    self._changed.notify_all()

    def _take(self) -> Visit | None:
        """The next row group, once there is room for it or the consumer cannot go on without it."""
        with self._changed:
            while True:
                if self._closed or self._next == len(self._visits):
                    return None
                visit = self._visits[self._next]
                rows = sum(part.count for part in visit.parts)
                if self._held + rows <= self._limit or visit.step <= self._step + 1:
                    self._next += 1
                    self._held += rows
                    return visit
                self._changed.wait()

    def _decode(self, visit: Visit) -> None:
        group = self._rows.groups[visit.group]
        columns = self._rows.read(group, self._columns)
        chosen = self._selection.of(visit.group)
        if chosen is not None:
            columns = {name: take(column, chosen) for name, column in columns.items()}
        for part in visit.parts:
            place = part.lane, part.block
            with self._changed:
                if self._closed:
                    return
                block = self._filling.get(place) or self._filling.setdefault(place, self._new_block(part, columns))
            block.fill(part, columns)
            with self._changed:
                block.missing -= part.count
                if block.missing:
                    continue
                del self._filling[place]
            done = block.finish()
            with self._changed:
                if part.block < self._floor.get(part.lane, 0):
                    self._drop(*place)
                else:
                    self._ready[place] = done
                    self._changed.notify_all()

    def _new_block(self, part: Part, columns: Columns) -> _Block:
        low, high = self._order.block_bounds(part.lane, part.block)
        places = self._order.permutation(part.lane, part.block) if self._order.shuffle else None
        block = _Block(places, high - low)
        for name, column in columns.items():
            if isinstance(column, Jagged):
                block.lists[name] = []
            else:
                block.dense[name] = np.empty(high - low, dtype=column.dtype)
        return block
