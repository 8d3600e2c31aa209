"""Signals, and flags that reach all ranks one step later."""

import os
import signal

import torch.distributed as dist

from recpress.trainer.loop.stopping import DelayedFlags, StopSignal
from tests.ranks import run_on_ranks


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignal() as found:
        assert found.name is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert found.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before


def exchanges():
    flags, rank = DelayedFlags(), dist.get_rank()
    found = [flags.exchange(stop=step == 1 and rank == 1, checkpoint=step == 0 and rank == 0) for step in range(3)]
    return found, flags.settle(stop=False), flags.settle(stop=rank == 0)


def test_all_ranks_get_the_flags_of_any_rank_one_step_later():
    expected = ([(False, False), (False, True), (True, False)], False, True)
    assert run_on_ranks(exchanges, 2) == [expected] * 2


def alone():
    return DelayedFlags().exchange(stop=True, checkpoint=False)


def test_a_single_rank_gets_its_flags_at_once():
    assert run_on_ranks(alone, 1) == [(True, False)]
