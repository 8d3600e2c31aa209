"""Vectors of all ids, in blocks over the ranks."""

from types import SimpleNamespace

import pytest
import torch

from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.model import vectors
from recpress.trainer.model.vectors import id_features, tower_vectors
from tests.trainer.small import CPU, ITEMS, USERS, config, factors, sides


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = TwoTower(config("frozen"), *sides())
    made.load_factors(*factors())
    return made.eval()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("world", [1, 3, 7])
def test_the_blocks_of_all_ranks_are_the_vectors_of_all_ids(model, monkeypatch, world, chunk):
    """On 7 ranks the last block of the items is short: its rank makes as many calls, for the collectives in them."""
    calls, parts = [], {"user": [], "item": []}
    for rank in range(world):
        here = SimpleNamespace(get_world_size=lambda: world, get_rank=lambda rank=rank: rank)
        monkeypatch.setattr(vectors, "dist", here)
        for side, found in parts.items():
            count = []

            def counted(ids, side=side, count=count):
                count.append(len(ids))
                return id_features(side, ids), None

            found.append(tower_vectors(model, side, device=CPU, inputs=counted, chunk=chunk))
            calls.append((side, tuple(count)))
    assert len(set(calls)) == 2
    for side, rows in (("user", USERS), ("item", ITEMS)):
        lookup = model.user_vectors if side == "user" else model.item_vectors
        expected = lookup(id_features(side, torch.arange(rows)))
        found = torch.cat(parts[side])
        assert found.shape == (rows, expected.shape[1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_features_of_ids_are_one_id_per_bag():
    found = id_features("item", torch.tensor([4, 4, 0]))
    assert found.keys() == ["item"]
    assert found.values().tolist() == [4, 4, 0]
    assert found.lengths().tolist() == [1, 1, 1]
