"""Errors of one rank become errors of all, and ranks that differ are named."""

import re

import pytest
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.distributed.rank_errors import assert_same_across_ranks, raise_on_all_ranks
from tests.ranks import run_on_ranks


def fails_on_one():
    try:
        with raise_on_all_ranks():
            if dist.get_rank() == 1:
                raise InputError("factors have dimension 8, expected 16")
    except InputError as error:
        return str(error)


def test_the_error_of_one_rank_is_raised_on_all():
    assert run_on_ranks(fails_on_one, 2) == ["factors have dimension 8, expected 16"] * 2


def test_without_a_process_group_an_error_is_as_it_was():
    with pytest.raises(ValueError, match="mine"), raise_on_all_ranks():
        raise ValueError("mine")


def differs():
    assert_same_across_ranks(configuration="same")
    try:
        assert_same_across_ranks(configuration=str(dist.get_rank()))
    except InputError as error:
        return str(error)


def test_ranks_with_another_configuration_are_named():
    for text in run_on_ranks(differs, 2):
        assert re.match(r"rank 1 has another configuration than rank 0 \(1, expected 0\); differs on 1 of 2", text)
