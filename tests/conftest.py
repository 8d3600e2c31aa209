"""Puts the repository root on the path: tests and the ranks that they spawn import `tests.ranks`. Marks slow tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STARTS_PROCESSES = ("run_on_ranks", "subprocess", "multiprocessing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of modules that start processes as slow: each process imports TorchRec, which takes seconds."""
    for item in items:
        module = item.getparent(pytest.Module)
        if module is not None and any(hasattr(module.obj, name) for name in STARTS_PROCESSES):
            item.add_marker(pytest.mark.slow)
