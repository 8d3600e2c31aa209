"""Work on the items of an iterator in a thread of its own, a few items ahead."""

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
"""Seconds. Where the caller comes back sooner, it has nothing to do beside: waking a thread, and being woken by it,
takes as long."""


def in_background(
    make: Callable[[Given], Made],
    items: Iterable[Given],
    ahead: int,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Made]:
    """`map(make, items)`, of which up to `ahead` results wait to be taken; with `ahead` 0 in the caller's thread.

    What is not there yet when it is asked for, and is not being made, the caller makes itself, so that one that only
    takes (a reader's benchmark, a copy) pays for no change of threads.

    What `make` or the iterator raises is raised here. The thread ends when the results are all taken, or the iterator
    is closed or forgotten. `waited` is told how long the caller waited for each, or made it.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    given = iter(items)
    results: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    calls: queue.SimpleQueue[None] = queue.SimpleQueue()  # the thread is to fill up what is missing
    making = threading.Lock()  # of who takes from `given`, so that results stay in their order
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

    atexit.register(end)  # Arrow must not be at work when the interpreter goes
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
