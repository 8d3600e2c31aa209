"""Cases in their own processes, and their memory."""

import os

import pytest

from recpress.benchmarks.processes import PeakMemory, in_own_processes


def test_cases_run_on_ranks_of_their_own_and_a_failure_is_told():
    assert in_own_processes(os.getenv, 2, "RANK") == ["0", "1"]
    assert in_own_processes(os.getenv, 1, "WORLD_SIZE") == ["1"]
    with pytest.raises(RuntimeError, match=r"a case failed:(.|\n)*invalid literal for int"):
        in_own_processes(int, 1, "x")
    with pytest.raises(RuntimeError, match="ended without a result"):
        in_own_processes(os._exit, 1, 3)


def test_the_peak_of_memory_counts_what_was_freed():
    memory = PeakMemory()
    held = bytearray(os.urandom(1 << 20)) * 64
    del held
    assert 60 << 20 < memory.bytes < 100 << 20
