"""The cost of a piece of work."""

from pathlib import Path

import numpy as np
import pytest

from recpress.benchmarks import measure


def test_a_cost_is_that_of_the_work():
    def work():
        block = np.ones(20_000_000, np.uint8)
        Path("/proc/self/cmdline").read_bytes()
        return len(block)

    found = measure.alone(lambda: measure.cost(work))
    assert found.done == 20_000_000
    assert 19e6 < found.peak < 40e6
    assert found.cpu > 0
    with pytest.raises(RuntimeError, match="ended with"):
        measure.alone(lambda: 1 / 0)
