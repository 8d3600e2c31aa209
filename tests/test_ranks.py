import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


def add_up(start):
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_one():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 says no")
    dist.barrier()


def test_results_come_in_order_of_rank():
    assert run_on_ranks(add_up, 2, 10) == [(0, 21), (1, 21)]


def test_the_error_of_a_rank_is_raised_here():
    with pytest.raises(ValueError, match="rank 1 says no"):
        run_on_ranks(fail_on_one, 2)
