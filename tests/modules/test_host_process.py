"""The modules change nothing of the process that uses them: no threads, no allocator."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recpress.data
import recpress.modules
from recpress.modules.als.factorization import ALS
from recpress.modules.als.half_sweep import Workers
from recpress.modules.config import ALSConfig


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def three_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def settings() -> tuple[int, int]:
    return torch.get_num_threads(), threads_of_a_new_thread()


def test_workers_change_nothing_for_the_host(three_threads: None) -> None:
    workers = Workers(torch.device("cpu"))
    assert workers.count == 3
    assert list(workers.map(torch.get_num_threads, iter([()] * 6))) == [1] * 6
    assert threads_of_a_new_thread() == 3
    workers.close()
    assert settings() == (3, 3)


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_factorization_leaves_the_threads_as_they_were(three_threads: None, fails: bool) -> None:
    def on_sweep(report: Any) -> None:
        assert threads_of_a_new_thread() == 3
        if fails:
            raise Stop

    als = ALS(ALSConfig(factors=4, sweeps=2, regularization=0.1), 50, 40)
    rng = np.random.default_rng(0)
    als.add(rng.integers(0, 50, 500), rng.integers(0, 40, 500))
    try:
        als.fit(on_sweep)
    except Stop:
        assert fails
    assert settings() == (3, 3)


def test_nothing_in_the_libraries_asks_the_allocator() -> None:
    for package in (recpress.modules, recpress.data):
        for path in Path(package.__path__[0]).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in ("malloc_trim", "mallopt", "ctypes")), path
