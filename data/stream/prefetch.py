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


def in_background(
    make: Callable[[Given], Made],
    items: Iterable[Given],
    ahead: int,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Made]:
    """`map(make, items)` by one background thread, up to `ahead` results ahead; with `ahead` 0 by the caller's thread.

    What `make` or the iterator raises is raised here. The thread ends with the last result, or when the iterator is
    closed or garbage-collected. `waited` receives the seconds that the caller waited for each result.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    given = iter(items)
    results: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    room = threading.Semaphore(ahead)
    stop = threading.Event()

    def run() -> None:
        try:
            while room.acquire() and not stop.is_set():
                try:
                    item = next(given)
                except StopIteration:
                    results.put(("end", None))
                    return
                results.put(("made", make(item)))
        except BaseException as error:  # to the caller, whatever it is
            results.put(("error", error))

    thread = threading.Thread(target=run, name="recpress-stream-batches", daemon=True)

    def end() -> None:
        stop.set()
        room.release()
        if thread.is_alive():
            thread.join()

    atexit.register(end)  # Arrow must not be at work when the interpreter exits
    thread.start()
    try:
        while True:
            began = time.perf_counter()
            kind, value = results.get()
            waited(time.perf_counter() - began)
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            room.release()
            yield value  # type: ignore[misc]
    finally:
        end()
        atexit.unregister(end)
        if (close := getattr(given, "close", None)) is not None:
            close()
