"""Reads row groups ahead of their use: threads decode them, other threads write their rows into shuffle windows.

A thread decodes a whole row group, with Arrow's own threads off: the fastest way that was measured. It hands the row
group to a writing thread, since writing waits for memory while decoding computes. A window is ready once no row is
missing.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from recpress.data.dataset.column_chunks import SPENT
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.sampling.selection import Selection
from recpress.data.stream.order import EpochOrder, RowGroupRead
from recpress.data.stream.shuffle_window import BufferPool, Columns, ShuffleWindow
from recpress.data.stream.stats import Meter


class ReadPlan:
    """What one rank reads from step `start` on, and how far ahead: arithmetic on row counts, no data is read."""

    def __init__(self, order: EpochOrder, rank: int, world: int, start: int) -> None:
        self.order, self.start = order, start
        self.reads = order.reads(rank, world, start)
        segments = [segment for read in self.reads for segment in read.segments]
        self.rows_of: Counter[int] = Counter()
        """Rows of each window."""
        for segment in segments:
            self.rows_of[segment.window] += segment.count
        self.largest = max((int(order.counts[read.group]) for read in self.reads), default=0)
        """Selected rows of a row group."""
        self.lanes = len({segment.lane for segment in segments})
        """Lanes that the rank reads."""
        self.limit = 2 * max(self.rows_of.values(), default=0) + self.lanes * self.largest
        """Rows that are read ahead, at most."""

    def most_windows(self) -> int:
        """Windows in memory at a time, complete or incomplete."""
        floor, top, held, most = self.order.window_of(self.start), 0, 0, 0
        for read in self.reads:
            rows = sum(segment.count for segment in read.segments)
            while held + rows > self.limit and self.order.window_of(read.step) > floor:
                held -= self.rows_of[floor]
                floor += 1
            held += rows
            top = max(top, *(segment.window for segment in read.segments))
            most = max(most, top - floor + 1)
        return most


class ReadAhead:
    """Reads the windows of one rank ahead of their use, in background threads.

    Reads ahead the rows of two windows, plus the sampled rows of one row group per lane of the rank. `threads` threads
    decode and as many write; at most one decoded row group waits between them. `close` (or leaving the `with` block)
    ends the threads. The next call of `window` raises what a thread raised.
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
        pool: BufferPool,
    ) -> None:
        self._rows, self._columns, self._order = rows, list(columns), order
        self._rank, self._world = rank, world
        self._selection, self._meter, self._pool = selection, meter, pool
        ahead = ReadPlan(order, rank, world, start)
        self._reads, self._rows_of, self._limit = ahead.reads, ahead.rows_of, ahead.limit
        self._next = 0
        self._step = start
        lock = threading.Lock()
        self._changed, self._decoded_some, self._wrote_some = (threading.Condition(lock) for _ in range(3))
        self._filling: dict[int, ShuffleWindow] = {}
        self._ready: dict[int, ShuffleWindow] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._held = 0  # rows that are decoded or being decoded, until their window is released
        self._floor = 0  # the first window that is not released
        self._decoded: deque[tuple[RowGroupRead, Columns]] = deque()
        self._decoding = threads  # decoding threads that are running
        self._threads = [
            threading.Thread(target=work, name=f"recpress-stream-{name}-{k}", daemon=True)
            for name, work in (("decode", self._decode_all), ("write", self._write_all))
            for k in range(threads)
        ]

    def __enter__(self) -> ReadAhead:
        atexit.register(self.close)  # Arrow must not run when the interpreter exits
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, after the row groups that they are decoding."""
        with self._changed:
            self._end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
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
        """Raise what a thread raised."""
        if self._error is not None:
            raise self._error

    def window(self, number: int, step: int) -> ShuffleWindow:
        """Wait for the window that step `step` needs. Raises what a thread raised."""
        with self._changed:
            self._step = step
            self._changed.notify_all()
            while number not in self._ready:
                self.check()
                assert not self._closed
                self._changed.wait()
            return self._ready[number]

    def release(self, number: int) -> None:
        """Forget the windows before this one, also those that are not complete yet once they are."""
        with self._changed:
            self._floor = number
            for earlier in [earlier for earlier in self._ready if earlier < number]:
                del self._ready[earlier]
                self._forget(earlier)

    def _forget(self, number: int) -> None:
        """With the lock."""
        self._held -= self._rows_of[number]
        self._changed.notify_all()

    # ---- the threads

    def _decode_all(self) -> None:
        try:
            while (read := self._take()) is not None:
                with self._errors_to_consumer(read):
                    self._hand_over(read, self._decode(read))
        finally:
            with self._changed:
                self._decoding -= 1
                self._decoded_some.notify_all()

    def _write_all(self) -> None:
        while (found := self._next_decoded()) is not None:
            read, columns = found
            began = time.perf_counter()
            with self._errors_to_consumer(read):
                self._write(read, columns)
            self._meter.add(shuffle=time.perf_counter() - began)
            del found, columns  # or a row group stays in memory while the next one is awaited

    @contextmanager
    def _errors_to_consumer(self, read: RowGroupRead) -> Iterator[None]:
        """Pass any error on to the consumer."""
        try:
            yield
        except BaseException as error:
            error.add_note(f"while reading {self._rows.where(self._rows.groups[read.group])}")
            with self._changed:
                self._error = self._error or error
                self._end()

    def _hand_over(self, read: RowGroupRead, columns: Columns) -> None:
        """Give a decoded row group to the writing threads, once they have taken the previous one."""
        began = time.perf_counter()
        with self._changed:
            while self._decoded and not self._closed:
                self._wrote_some.wait()
            self._decoded.append((read, columns))
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
        """The next row group to decode, once there is room for it or the consumer waits for it."""
        with self._changed:
            while True:
                if self._closed or self._next == len(self._reads):
                    return None
                read = self._reads[self._next]
                rows = sum(segment.count for segment in read.segments)
                if self._held + rows <= self._limit or read.step <= self._step + 1:
                    self._next += 1
                    self._held += rows
                    return read
                began = time.perf_counter()
                self._changed.wait()
                self._meter.add(room=time.perf_counter() - began)

    def _decode(self, read: RowGroupRead) -> Columns:
        group = self._rows.groups[read.group]
        SPENT.bytes, SPENT.seconds = 0, 0.0
        times = [time.perf_counter()]
        columns = self._rows.read(group, self._columns)
        times.append(time.perf_counter())
        chosen = self._selection.of(read.group)
        if chosen is not None:
            columns = {name: column.take(chosen) for name, column in columns.items()}
        times.append(time.perf_counter())
        self._meter.add(
            bytes=SPENT.bytes,
            read=SPENT.seconds,
            decode=times[1] - times[0] - SPENT.seconds,
            sample=times[2] - times[1],
        )
        return columns

    def _write(self, read: RowGroupRead, columns: Columns) -> None:
        """Write the rows of a row group into their windows."""
        for segment in read.segments:
            with self._changed:
                if self._closed:
                    return
                made = self._filling.get(segment.window) or self._filling.setdefault(
                    segment.window, self._new_window(segment.window, columns)
                )
            made.fill(segment, columns)
            with self._changed:
                made.missing -= segment.count
                if made.missing:
                    continue
                del self._filling[segment.window]
            made.finish()
            with self._changed:
                if segment.window < self._floor:
                    self._forget(segment.window)
                else:
                    self._ready[segment.window] = made
                    self._changed.notify_all()

    def _new_window(self, number: int, columns: Columns) -> ShuffleWindow:
        return ShuffleWindow(self._order, number, self._rank, self._world, columns, self._rows_of[number], self._pool)
