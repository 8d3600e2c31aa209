"""Work in a background thread."""

import itertools
import threading
import time

import pytest

from recpress.data.errors import InputError
from recpress.data.stream.prefetch import in_background


def test_background_is_map_and_bounded():
    taken = []

    def items():
        for number in itertools.count():
            taken.append(number)
            yield number

    results = in_background(lambda number: number * 2, items(), 3)
    for k in range(5):
        assert next(results) == 2 * k
        threading.Event().wait(0.01)  # a caller that is away: what comes next is made beside
    deadline = time.monotonic() + 20
    while len(taken) < 5 + 3 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)
    assert len(taken) == 5 + 3
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_results_are_in_order_whichever_thread_makes_them(ahead):
    threads = set()

    def make(number):
        threads.add(threading.get_ident())
        time.sleep(0.001 * (number % 7 == 0))
        return number

    found = []
    for number in in_background(make, iter(range(300)), ahead):
        found.append(number)
        time.sleep(0.001 * (number // 20 % 2))  # away, and back at once, by turns
    assert found == list(range(300))
    assert threading.get_ident() in threads
    assert len(threads) == (1 if ahead == 0 else 2)


def test_background_raises_what_the_work_raises():
    def work(number):
        if number == 2:
            raise InputError("two")
        return number

    results = in_background(work, iter(range(5)), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match="two"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]
