"""The permutations of tiles."""

import numpy as np
import pytest

from recpress.data.stream.shuffle import Pool, members


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_sources_invert_the_rotated_permutation(rows):
    pool = Pool(seed=3, epoch=1)
    for member in range(members(rows)):
        places = (pool.permutation(rows, member) + 5 % rows) % rows
        assert np.array_equal(np.sort(places), np.arange(rows))
        assert np.array_equal(places[pool.sources(rows, member, 5 % rows)], np.arange(rows))


def test_epochs_have_other_permutations():
    first, second = (Pool(seed=3, epoch=epoch).permutation(1000, 0) for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_grid_gives_addresses_step_by_step():
    assert Pool(0, 0).grid(2, 3, 1, 10).tolist() == [0, 1, 2, 10, 11, 12, 20]
