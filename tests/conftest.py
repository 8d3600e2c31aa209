"""Puts the repository root on the path: tests and the ranks that they spawn import `tests.ranks`. Marks slow tests.

A test with the argument `device` runs on the CPU, and on CUDA if this machine has a GPU. On such a machine no test that
needs CUDA is skipped: `RECPRESS_TEST_DEVICE=cpu` is the way to leave them out.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STARTS_PROCESSES = ("run_on_ranks", "subprocess", "multiprocessing")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and os.environ.get("RECPRESS_TEST_DEVICE") != "cpu" else ["cpu"]


def pytest_configure() -> None:
    gpu = Path("/dev/nvidia0").exists() and os.environ.get("RECPRESS_TEST_DEVICE") != "cpu"
    if gpu and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"this machine has a GPU that torch {torch.__version__} cannot use, so no test would run on it; install "
            "the CUDA set (scripts/install.sh), or set RECPRESS_TEST_DEVICE=cpu"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the argument `device`, unless the test does."""
    given = {name for mark in metafunc.definition.iter_markers("parametrize") for name in str(mark.args[0]).split(",")}
    if "device" in metafunc.fixturenames and "device" not in given:
        metafunc.parametrize("device", [torch.device(name) for name in DEVICES], ids=DEVICES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of modules that start processes as slow: each process imports TorchRec, which takes seconds."""
    for item in items:
        module = item.getparent(pytest.Module)
        if module is not None and any(hasattr(module.obj, name) for name in STARTS_PROCESSES):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """On a machine with a GPU, a test that skips because CUDA is missing fails."""
    report = yield
    if "cuda" in DEVICES and report.skipped and "cuda" in str(report.longrepr).lower():
        report.outcome, report.longrepr = "failed", f"{item.nodeid} is skipped although this machine has a GPU"
    return report
