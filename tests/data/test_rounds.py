"""Memory of rounds that is used again."""

import torch
from recpress.data.order import TILE_ROWS
from recpress.data.rounds import Spare


def test_a_tile_is_used_again_only_for_columns_of_its_types_and_length():
    spare = Spare()
    ids = {"user_id": torch.zeros(3, dtype=torch.int64), "time": torch.zeros(3, dtype=torch.int64)}
    tile = spare.take_tile(3, ids)
    assert {name: (column.dtype, len(column)) for name, column in tile.items()} == {
        "user_id": (torch.int64, TILE_ROWS),
        "time": (torch.int64, TILE_ROWS),
    }
    spare.give_tile(tile)
    assert spare.take_tile(3, ids) is tile
    spare.give_tile(tile)
    other = spare.take_tile(3, ids | {"time": torch.zeros(3, dtype=torch.float64)})
    assert other["time"].dtype == torch.float64  # integers would cut its values off
    spare.give_tile(other)
    assert len(spare.take_tile(TILE_ROWS + 1, ids)["time"]) == TILE_ROWS + 1
