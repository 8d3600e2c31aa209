"""Statistics of a stream: rows and bytes per second, and shares of time per kind of work."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass

THREAD_WORK = ("read", "decode", "sample", "shuffle", "room")
"""Work of the decoding threads and, `shuffle`, of the writing threads."""
CONSUMER_WORK = ("assemble", "wait")


@dataclass(frozen=True)
class StreamStats:
    """Of the time since the last call of `InteractionStream.stats`, on this rank."""

    seconds: float
    rows_per_second: float
    """Rows given out."""
    bytes_per_second: float
    """Compressed bytes of the columns that were read, with holes between them of up to 256 KiB."""
    read: float
    """Share of the decoding threads' time until the bytes of a row group are in memory: disk or network."""
    decode: float
    """... until they are checked columns."""
    sample: float
    """... to choose and take the rows of the sample."""
    shuffle: float
    """Share of the writing threads' time to put the rows in their places in the batches."""
    room: float
    """Share of the decoding threads' time without room for more: writing or the consumer is the slower one."""
    assemble: float
    """Share of the consumer's time to make batches of what is ready."""
    wait: float
    """... waiting for data: reading is the slower one."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Meter:
    """Adds up the times of several threads, each with its own counters; a call costs less than a microsecond."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: list[dict[str, float]] = []
        self._last: dict[str, float] = {}
        self._mark = time.perf_counter()

    def add(self, **amounts: float) -> None:
        counters = getattr(self._own, "counters", None)
        if counters is None:
            counters = self._own.counters = {}
            self._all.append(counters)
        for name, amount in amounts.items():
            counters[name] = counters.get(name, 0.0) + amount

    def stats(self, threads: int) -> StreamStats:
        """Since the last call."""
        now, total = time.perf_counter(), dict[str, float]()
        for counters in list(self._all):
            for name, amount in counters.copy().items():
                total[name] = total.get(name, 0.0) + amount
        seconds = max(now - self._mark, 1e-9)
        since = {name: amount - self._last.get(name, 0.0) for name, amount in total.items()}
        self._mark, self._last = now, total
        shares = {name: since.get(name, 0.0) / seconds / threads for name in THREAD_WORK}
        shares |= {name: since.get(name, 0.0) / seconds for name in CONSUMER_WORK}
        return StreamStats(
            seconds=seconds,
            rows_per_second=since.get("rows", 0.0) / seconds,
            bytes_per_second=since.get("bytes", 0.0) / seconds,
            **shares,
        )
