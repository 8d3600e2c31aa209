"""The parts that must run on a GPU have tests with the argument `device`, which run there when there is one."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "path",
    [
        "data/negatives/test_samplers.py",
        "data/stream/test_batch.py",
        "modules/als/test_half_sweep.py",
        "modules/frozen/test_collection.py",
        "modules/hashing/test_learned_hash.py",
        "modules/two_tower/test_model.py",
        "trainer/checkpoint/test_dcp_storage.py",
        "trainer/evaluate/test_ranking.py",
        "trainer/loop/test_fit.py",
    ],
)
def test_a_test_runs_on_every_device(path: str) -> None:
    assert re.search(r"^def test_\w+\([^)]*\bdevice\b", (TESTS / path).read_text(), re.MULTILINE)


def test_no_test_is_skipped_without_cuda_on_its_own() -> None:
    """The argument `device` has no CUDA where there is none; a mark of a test would also hide it where there is."""
    for path in TESTS.rglob("test_*.py"):
        assert not re.search(r"skip\w*\(not torch\.cuda", path.read_text()), path


def test_the_devices_of_this_machine(device: object) -> None:
    assert getattr(device, "type", None) in ("cpu", "cuda")
