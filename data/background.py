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


def in_background(
    make: Callable[[Given], Made],
    items: Iterable[Given],
    ahead: int,
    waited: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Made]:
    """`map(make, items)`, of which up to `ahead` results wait to be taken; with `ahead` 0 in the caller's thread.

    What the thread raises is raised here. The thread ends when the results are all taken, or the iterator is closed or
    forgotten. `waited` is told how long the caller's thread waited for each.
    """
    if ahead < 1:
        yield from map(make, items)
        return
    # Two queues in C: one of Python's own with a limit takes a lock and a condition for each item.
    results: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each result that there is room for
    for _ in range(ahead):
        room.put(None)
    stop = threading.Event()

    def run() -> None:
        given = iter(items)
        try:
            for item in given:
                made = make(item)
                room.get()
                if stop.is_set():
                    break
                results.put(("made", made))
            else:
                results.put(("end", None))
        except BaseException as error:  # to the consumer, whatever it is
            results.put(("error", error))
        finally:
            if (close := getattr(given, "close", None)) is not None:
                close()

    thread = threading.Thread(target=run, name="recpress-stream-batches", daemon=True)

    def end() -> None:
        stop.set()
        room.put(None)
        if thread.is_alive():
            thread.join()

    atexit.register(end)  # Arrow must not be at work when the interpreter goes
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
            room.put(None)
            yield value  # type: ignore[misc]
    finally:
        end()
        atexit.unregister(end)
