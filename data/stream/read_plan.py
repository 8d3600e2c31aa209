"""Background reading: threads decode row groups, others write their rows to their places in the rounds of batches.

A thread decodes a whole row group with Arrow's own threads off (the fastest way that was measured) and hands it to a
thread that writes each column to its place in the batches: writing waits for memory, decoding computes. A round is
ready once it has all of its rows.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from recpress.data.dataset.column_chunks import SPENT
from recpress.data.dataset.columns import take
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.sampling.selection import Selection
from recpress.data.stream.order import EpochOrder, RowGroupRead
from recpress.data.stream.shuffle_window import BufferPool, Columns, ShuffleWindow
from recpress.data.stream.stats import Meter


class ReadPlan:
    """What one rank reads from a step on, and how far ahead of its use: arithmetic, no data."""

    def __init__(self, order: EpochOrder, rank: int, world: int, start: int) -> None:
        self.order, self.start = order, start
        self.visits = order.visits(rank, world, start)
        parts = [part for visit in self.visits for part in visit.parts]
        self.rows_of: Counter[int] = Counter()
        """Rows of each round."""
        for part in parts:
            self.rows_of[part.window] += part.count
        self.largest = max((int(order.counts[visit.group]) for visit in self.visits), default=0)
        """Selected rows of a row group."""
        self.lanes = len({part.lane for part in parts})
        """Of which the rank reads."""
        self.limit = 2 * max(self.rows_of.values(), default=0) + self.lanes * self.largest
        """Rows that are read and not yet given out."""

    def most_windows(self) -> int:
        """Rounds that are in memory at a time, whole or in part."""
        floor, top, held, most = self.order.window_of(self.start), 0, 0, 0
        for visit in self.visits:
            rows = sum(part.count for part in visit.parts)
            while held + rows > self.limit and self.order.window_of(visit.step) > floor:
                held -= self.rows_of[floor]
                floor += 1
            held += rows
            top = max(top, *(part.window for part in visit.parts))
            most = max(most, top - floor + 1)
        return most


class ReadAhead:
    """Reads the rounds that one rank needs, ahead of their use, in threads of its own.

    Holds the rows of two rounds, and in addition one row group's sampled rows for each of the rank's lanes. There are
    `threads` that decode and as many that write; one row group at most lies between them.
    `close` (or leaving the `with`) ends the threads; an error in a thread is raised by the next `round`.
    """

    def __init__(
        self,
        rows: ParquetSplit,
        columns: Sequence[str],
        order: EpochOrder,
        *,
        rank: int,
        world: int,
        selection: Selection,
        threads: int,
        start: int,
        meter: Meter,
        buffers: BufferPool,
    ) -> None:
        self._rows, self._columns, self._order = rows, list(columns), order
        self._rank, self._world = rank, world
        self._selection, self._meter, self._buffers = selection, meter, buffers
        ahead = ReadPlan(order, rank, world, start)
        self._visits, self._rows_of, self._limit = ahead.visits, ahead.rows_of, ahead.limit
        self._next = 0
        self._step = start
        lock = threading.Lock()
        self._changed, self._decoded_some, self._wrote_some = (threading.Condition(lock) for _ in range(3))
        self._filling: dict[int, ShuffleWindow] = {}
        self._ready: dict[int, ShuffleWindow] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._held = 0  # rows decoded or being decoded and not yet released
        self._floor = 0  # the first round that is still wanted
        self._decoded: deque[tuple[RowGroupRead, Columns]] = deque()
        self._decoding = threads  # threads that may still hand over a row group
        self._threads = [
            threading.Thread(target=work, name=f"recpress-stream-{name}-{k}", daemon=True)
            for name, work in (("decode", self._decode_all), ("write", self._write_all))
            for k in range(threads)
        ]

    def __enter__(self) -> ReadAhead:
        atexit.register(self.close)  # Arrow must not be at work when the interpreter goes
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, after the row groups that they are decoding."""
        with self._changed:
            self._end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for window in (*self._ready.values(), *self._filling.values()):
            window.close()
        self._ready.clear()
        self._filling.clear()
        self._decoded.clear()
        atexit.unregister(self.close)

    def _end(self) -> None:
        """With the lock."""
        self._closed = True
        for condition in (self._changed, self._decoded_some, self._wrote_some):
            condition.notify_all()

    # ---- the consumer

    def check(self) -> None:
        """Raises what a thread has raised."""
        if self._error is not None:
            raise self._error

    def window(self, number: int, step: int) -> ShuffleWindow:
        """The rows of a round, which step `step` needs; waits for it. Raises what a thread has raised."""
        with self._changed:
            self._step = step
            self._changed.notify_all()
            while number not in self._ready:
                self.check()
                assert not self._closed
                self._changed.wait()
            return self._ready[number]

    def release(self, number: int) -> None:
        """Forgets the rounds before this one, also those that are not read yet."""
        with self._changed:
            self._floor = number
            for earlier in [earlier for earlier in self._ready if earlier < number]:
                self._drop(earlier, self._ready.pop(earlier))

    def _drop(self, number: int, window: ShuffleWindow) -> None:
        """With the lock."""
        window.close()
        self._held -= self._rows_of[number]
        self._changed.notify_all()

    # ---- the threads

    def _decode_all(self) -> None:
        try:
            while (visit := self._take()) is not None:
                with self._told(visit):
                    self._hand_over(visit, self._decode(visit))
        finally:
            with self._changed:
                self._decoding -= 1
                self._decoded_some.notify_all()

    def _write_all(self) -> None:
        while (found := self._next_decoded()) is not None:
            visit, columns = found
            began = time.perf_counter()
            with self._told(visit):
                self._deal(visit, columns)
            self._meter.add(shuffle=time.perf_counter() - began)

    @contextmanager
    def _told(self, visit: RowGroupRead) -> Iterator[None]:
        """Lets the consumer know of an error, whatever it is."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"while reading {self._rows.where(self._rows.groups[visit.group])}")
            with self._changed:
                self._error = self._error or error
                self._end()

    def _hand_over(self, visit: RowGroupRead, columns: Columns) -> None:
        """To the threads that write, once they have taken what was handed over before."""
        began = time.perf_counter()
        with self._changed:
            while self._decoded and not self._closed:
                self._wrote_some.wait()
            self._decoded.append((visit, columns))
            self._decoded_some.notify()
        self._meter.add(room=time.perf_counter() - began)

    def _next_decoded(self) -> tuple[RowGroupRead, Columns] | None:
        with self._changed:
            while not self._decoded:
                if self._closed or not self._decoding:
                    return None
                self._decoded_some.wait()
            self._wrote_some.notify()
            return self._decoded.popleft()

    def _take(self) -> RowGroupRead | None:
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
                began = time.perf_counter()
                self._changed.wait()
                self._meter.add(room=time.perf_counter() - began)

    def _decode(self, visit: RowGroupRead) -> Columns:
        group = self._rows.groups[visit.group]
        SPENT.bytes, SPENT.seconds = 0, 0.0
        times = [time.perf_counter()]
        columns = self._rows.read(group, self._columns)
        times.append(time.perf_counter())
        chosen = self._selection.of(visit.group)
        if chosen is not None:
            columns = {name: take(column, chosen) for name, column in columns.items()}
        times.append(time.perf_counter())
        self._meter.add(
            bytes=SPENT.bytes,
            read=SPENT.seconds,
            decode=times[1] - times[0] - SPENT.seconds,
            sample=times[2] - times[1],
        )
        return columns

    def _deal(self, visit: RowGroupRead, columns: Columns) -> None:
        """Writes the rows of a row group to their rounds."""
        for part in visit.parts:
            with self._changed:
                if self._closed:
                    return
                made = self._filling.get(part.window) or self._filling.setdefault(
                    part.window, self._new_window(part.window, columns)
                )
            made.fill(part, columns)
            with self._changed:
                made.missing -= part.count
                if made.missing:
                    continue
                del self._filling[part.window]
            made.finish()
            with self._changed:
                if part.window < self._floor:
                    self._drop(part.window, made)
                else:
                    self._ready[part.window] = made
                    self._changed.notify_all()

    def _new_window(self, number: int, columns: Columns) -> ShuffleWindow:
        return ShuffleWindow(
            self._order, number, self._rank, self._world, columns, self._rows_of[number], self._buffers
        )
