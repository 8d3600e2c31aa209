"""Samples of whole row groups."""

import numpy as np

from recpress.data.sampling.block_sample import drawn


def test_the_size_is_exact_and_at_most_one_row_group_is_partial():
    sizes = [10, 0, 7, 30, 13, 40]
    for seed in range(50):
        found = drawn(sizes, 0.3, seed)
        assert found.sum() == 30
        assert sum(0 < rows < size for rows, size in zip(found, sizes, strict=True)) <= 1


def test_each_row_has_the_same_probability():
    sizes = np.array([10, 20, 70])
    mean = np.mean([drawn(sizes.tolist(), 0.3, seed) for seed in range(3000)], axis=0)
    assert np.allclose(mean / sizes, 0.3, atol=0.05)
