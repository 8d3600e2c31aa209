"""Permutations and draws that are computed row by row."""

import numpy as np

from recpress.data.synthetic.tastes import Permutation, uniform


def test_a_computed_permutation_is_one():
    for size in (1, 2, 100, 1000):
        places = Permutation(size, seed=4)(np.arange(size, dtype=np.uint64))
        assert np.array_equal(np.sort(places), np.arange(size))


def test_uniform_numbers_depend_on_id_seed_and_use():
    ids = np.arange(10_000)
    found = uniform(ids, 1, 2)
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean() - 0.5) < 0.02
    assert np.array_equal(found[5:7], uniform(ids[5:7], 1, 2))
    assert not np.array_equal(found, uniform(ids, 1, 3))
