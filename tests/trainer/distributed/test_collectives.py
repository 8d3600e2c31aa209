"""Collectives on arrays, on two ranks and without a process group."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.trainer.distributed import collectives
from tests.ranks import run_on_ranks


def arrays():
    rank, _ = collectives.rank_and_world()
    mine = [np.arange(rank + 1), np.full(2, rank, np.float32)]
    everyone = collectives.all_gather_arrays(mine)
    gathered = collectives.gather_arrays(mine)
    sent = collectives.exchange([np.array([10, 11, 12]) + 100 * rank], np.array([1, 0, 1]))
    total = collectives.all_reduce(torch.tensor([rank + 1]))
    return [[a.tolist() for a in of_rank] for of_rank in everyone], gathered is None, sent[0].tolist(), int(total)


def test_two_ranks():
    first, second = run_on_ranks(arrays, 2)
    both = [[[0], [0.0, 0.0]], [[0, 1], [1.0, 1.0]]]
    assert first == (both, False, [11, 111], 3)
    assert second == (both, True, [10, 12, 110, 112], 3)


@pytest.mark.skipif(dist.is_initialized(), reason="needs no process group")
def test_without_a_process_group():
    assert arrays() == ([[[0], [0.0, 0.0]]], False, [10, 11, 12], 1)
