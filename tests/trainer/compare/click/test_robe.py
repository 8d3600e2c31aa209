"""ROBE: positions by the authors' formula."""

import pytest
import torch

from recpress.trainer.compare.click.robe import PRIME, RobeArray, RobeTable


@pytest.mark.parametrize("block", [8, 2, 1])
def test_vectors_are_blocks_from_hashed_positions(block):
    array = RobeArray(11, 8, block, seed=3)
    array.numbers.data = torch.arange(11.0)
    found = RobeTable(array, first=100)(torch.tensor([7, 900_000_000]))
    for key, vector in zip((107, 900_000_100), found.tolist(), strict=True):
        expected = []
        for part in range(8 // block):
            start = (array.a * key + array.b * part + array.c) % PRIME % 11
            expected += [(start + place) % 11 for place in range(block)]
        assert vector == expected


def test_tables_share_the_array_and_its_gradient():
    array = RobeArray(40, 4, 4, seed=0)
    RobeTable(array, 0)(torch.tensor([5])).sum().backward()
    once = array.numbers.grad.clone()
    RobeTable(array, 5)(torch.tensor([0])).sum().backward()
    assert torch.equal(array.numbers.grad, 2 * once)
    assert int(once.sum()) == 4


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="blocks of 3"):
        RobeArray(40, 8, 3, seed=0)
