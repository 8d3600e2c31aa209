"""Collectives of the factorization at several world sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from tests.ranks import run_on_ranks

ROWS = 11


def on_rank() -> list[np.ndarray]:
    exchange = Exchange(None, torch.device("cpu"))
    blocks = RowBlocks(ROWS, exchange.world)
    table = torch.arange(ROWS * 2, dtype=torch.float32).view(ROWS, 2)
    shard = table[blocks.start(exchange.rank) : blocks.stop(exchange.rank)]
    ids = torch.arange(exchange.rank, ROWS, 3)  # other rows on each rank
    assert torch.equal(exchange.fetch_rows(shard, ids, blocks), table[ids])
    assert torch.equal(exchange.gather(shard, blocks), table)
    assert exchange.max(exchange.rank) == exchange.world - 1
    assert exchange.sum(torch.tensor(exchange.rank)) == sum(range(exchange.world))
    sent = [np.full(to + 1, 10 * exchange.rank + to) for to in range(exchange.world)]
    return [exchange.all_to_all(sent)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_and_arrays_reach_the_ranks_that_need_them(world: int) -> None:
    for rank, (received,) in enumerate(run_on_ranks(on_rank, world=world)):
        assert received.tolist() == [10 * source + rank for source in range(world) for _ in range(rank + 1)]
