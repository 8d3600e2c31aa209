"""Benchmarks fork. In a process whose OpenMP threads have started, the fork would wait for them without end."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These tests come first in a run, so no test has started threads before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
