"""The set of pairs of users and items."""

import numpy as np
import pytest
import torch

from recpress.data.errors import InputError
from recpress.data.negatives.interaction_set import InteractionSet, mix, shift, signed


def test_membership_is_that_of_a_python_set():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 20, 300), rng.integers(0, 30, 300)
    pairs, known = InteractionSet.of_pairs(users, items, 30), set(zip(users.tolist(), items.tolist(), strict=True))
    assert len(pairs) == len(known)
    grid = [[(user, item) in known for item in range(30)] for user in range(20)]
    every_user, every_item = torch.arange(20), torch.arange(30)
    assert pairs.contains(every_user[:, None], every_item).tolist() == grid
    assert pairs.among(every_user, every_item).tolist() == grid


def test_keys_beyond_63_bits_are_refused():
    with pytest.raises(InputError, match="63 bits"):
        InteractionSet.of_pairs(np.array([2**40]), np.array([0]), 2**30)


def test_64_bit_arithmetic():
    assert signed(2**64 - 1) == -1
    assert shift(torch.tensor([-1]), 60).tolist() == [15]
    assert len(mix(torch.arange(1000)).unique()) == 1000
