"""Statistics of a stream."""

import threading

import pytest

from recpress.data.stream.stats import Meter


def test_amounts_of_all_threads_add_up_since_the_last_call():
    meter = Meter()
    threads = [threading.Thread(target=lambda: meter.add(rows=10, decode=0.5)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = meter.stats(threads=2)
    assert stats.rows_per_second * stats.seconds == pytest.approx(30)
    assert stats.decode * stats.seconds * 2 == pytest.approx(1.5)
    assert meter.stats(threads=2).rows_per_second == 0
