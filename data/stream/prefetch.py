"""Work on the items of an iterator in a background thread, a few items ahead."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

WORTH = 200e-6
"""Seconds. A caller that returns sooner does no work of its own: waking the thread and being woken by it would take as
long as that."""


def in_background(
    make: Callable[[Given], Made],
    items: Iterable[Given],
    ahead: int,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Made]:
    """`map(make, items)`, up to `ahead` results ahead in a background thread; with `ahead` 0 in the caller's thread.

    A caller that asks for a result that is neither there nor being made makes it itself, under the lock of the thread.
    Without this, a caller that does nothing else (a copy, a reader's benchmark) changes threads for each batch: reading
    a narrow log takes a tenth more wall time and 7 % more CPU time (benchmarks/README.md, "Reader").

    What `make` or the iterator raises is raised here. The thread ends with the last result, or when the iterator is
    closed or garbage-collected. `waited` receives the seconds until the caller had each result.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    given = iter(items)
    results: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    calls: queue.SimpleQueue[None] = queue.SimpleQueue()  # each asks the thread to fill `results`
    making = threading.Lock()  # of the thread that takes from `given`: results stay in order
    stop = threading.Event()

    def one() -> tuple[str, object]:
        try:
            for item in given:
                return "made", make(item)
            return "end", None
        except BaseException as error:  # to the caller, whatever it is
            return "error", error

    def run() -> None:
        kind = "made"
        while kind == "made":
            calls.get()
            while kind == "made":
                with making:
                    if stop.is_set() or results.qsize() >= ahead:
                        break
                    kind, value = one()
                    results.put((kind, value))
            if stop.is_set():
                return

    def take() -> tuple[str, object]:
        try:
            return results.get_nowait()
        except queue.Empty:
            if not making.acquire(blocking=False):
                return results.get()  # the thread is about to put it there
        try:
            return results.get_nowait() if results.qsize() else one()
        finally:
            making.release()

    thread = threading.Thread(target=run, name="recpress-stream-batches", daemon=True)

    def end() -> None:
        stop.set()
        calls.put(None)
        if thread.is_alive():
            thread.join()

    atexit.register(end)  # Arrow must not be at work when the interpreter exits
    thread.start()
    left = float("-inf")
    try:
        while True:
            began = time.perf_counter()
            away = began - left
            kind, value = take()
            waited(time.perf_counter() - began)
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            if away > WORTH and calls.empty():
                calls.put(None)
            left = time.perf_counter()
            yield value  # type: ignore[misc]
    finally:
        end()
        atexit.unregister(end)
        if (close := getattr(given, "close", None)) is not None:
            close()
