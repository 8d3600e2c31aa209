"""The quality of known orders."""

import numpy as np
import pytest

from recpress.benchmarks import shuffle


def test_qualities_of_known_orders():
    rows, batch = 1 << 16, 64
    rng = np.random.default_rng(0)
    still = shuffle.quality(np.arange(rows), batch)
    assert still["moved"] == 0
    assert still["clumps"] == pytest.approx(batch, rel=0.02)
    perfect = shuffle.quality(rng.permutation(rows), batch)
    assert perfect["moved"] == pytest.approx(1 / 3, rel=0.02)
    assert perfect["50 %"] == pytest.approx(0.293, rel=0.03)
    assert perfect["clumps"] == pytest.approx(1, rel=0.2)


def test_a_shuffle_buffer_is_that_of_the_plain_loop():
    rows, size = 500, 40
    slots = np.random.default_rng(3).integers(0, size, rows - size)
    buffer, want = list(range(size)), []
    for step, slot in enumerate(slots):
        want.append(buffer[slot])
        buffer[slot] = size + step
    found = shuffle.buffered(rows, size, np.random.default_rng(3))
    assert found[: rows - size].tolist() == want
    assert sorted(found[rows - size :].tolist()) == sorted(buffer)
