"""Freed memory stays with the process while it trains, and goes back to the system after."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from recpress.trainer.allocator import RetainFreedMemory, _set_by_user, malloc_trim

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MIB = 1 << 20


def resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def faults_and_memory(keep: bool, pipe: Any) -> None:  # in a process of its own: glibc's thresholds move with use
    import resource

    import torch

    with RetainFreedMemory(keep) as memory:
        start = resident()
        for _ in range(20):  # until the small pieces, which aligned blocks leave and glibc < 2.38 hoards, are enough
            torch.ones(64 * MIB // 4)  # freed at once
        held = resident() - start
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(64 * MIB // 4)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        malloc_trim()
        given = resident() - start
        larger = (held + 64 * MIB) // 4  # than any free part of the heap: such a part is used first, and stays
        with memory.suspended():
            torch.ones(larger)
            usual = resident() - start
        torch.ones(larger)  # not given back
    pipe.send((held, faults, given, usual, resident() - start))


def measured(keep: bool) -> tuple[int, ...]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=faults_and_memory, args=(keep, theirs))
    process.start()
    assert mine.poll(60), "no answer within 60 s"
    found = mine.recv()
    process.join()
    return found


def test_what_is_freed_is_used_again_and_given_back_at_the_end():
    held, faults, given, usual, after = measured(keep=True)
    assert held > 60 * MIB
    assert faults < 1000  # of 5 x 16,384 pages
    assert given < 8 * MIB
    assert usual < 8 * MIB
    assert after < 8 * MIB


def test_glibc_gives_such_blocks_back_at_once():
    held, faults, *_ = measured(keep=False)
    assert held < 8 * MIB
    assert faults > 5 * 16  # huge pages or small ones


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_MAX_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.check=1"},
    ],
)
def test_a_threshold_of_the_users_own_stays(environment):
    assert _set_by_user(environment)
    assert not _set_by_user({"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
