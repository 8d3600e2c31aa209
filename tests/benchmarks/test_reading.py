"""The readers that are compared give the same rows, and what is measured of a shuffle is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recpress.benchmarks import measure, readers, resume, shuffle, synthetic_logs
from recpress.data.config import StreamConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    return {
        "narrow": synthetic_logs.narrow(folder / "narrow", 2000),
        "groups": synthetic_logs.narrow(folder / "groups", 2000, 900),
        "wide": synthetic_logs.wide(folder / "wide", 700),
        "lists": synthetic_logs.with_lists(folder / "lists", 700),
    }


@pytest.mark.parametrize("shape", ["narrow", "groups", "wide", "lists"])
def test_all_readers_give_the_same_ids(made, shape, monkeypatch):
    """Sums of each key's ids and of the labels, over all batches, do not depend on the order."""
    log, found = made[shape], {}
    sums = {}

    def summing(features, label, floats):
        assert features.keys() == list(log.keys)
        parts = features.to_dict()
        total = [int(parts[key].values().sum()) for key in log.keys]
        assert [len(parts[key].lengths()) for key in log.keys] == [len(label)] * len(log.keys)
        total += [float(label.sum(dtype=torch.float64)), len(label)]
        if floats is not None:
            assert floats.shape == (len(label), len(log.floats))
            total.append(float(floats.sum(dtype=torch.float64)))
        found[current] = [a + b for a, b in zip(found.get(current, [0] * len(total)), total, strict=True)]

    monkeypatch.setattr(readers, "hand_over", summing)
    sides = [readers.Peer("ours", readers.ours(log, StreamConfig(batch_size=128)))]
    sides += [side for side in readers.peers(log, 128, 100.0) if not side.workers and not side.missing]
    for side in sides:
        current = side.name
        sums[current] = side.read()
    assert len(found) >= 2
    first = found.pop("ours")
    for name, other in found.items():
        assert other == pytest.approx(first, rel=1e-9), name
    assert set(sums.values()) == {first[len(log.keys) + 1]}
    assert readers.bare(log, 2)() == first[len(log.keys) + 1]


def test_a_cost_is_that_of_the_work():
    def work():
        block = np.ones(20_000_000, np.uint8)
        Path("/proc/self/cmdline").read_bytes()
        return len(block)

    found = measure.alone(lambda: measure.cost(work))
    assert found.done == 20_000_000
    assert 19e6 < found.peak < 40e6
    assert found.cpu > 0
    with pytest.raises(RuntimeError, match="ended with"):
        measure.alone(lambda: 1 / 0)


def test_a_long_log_is_one_file_under_many_names(tmp_path):
    long = synthetic_logs.long(tmp_path, 2500, file_rows=1000)
    assert len(long.files) == 3
    config = StreamConfig(batch_size=100, num_threads=1)
    assert resume.ours(long, config)(17) == 100
    assert readers.ours(long, config)() == 3000


def test_qualities_of_known_orders():
    rows, batch = 1 << 16, 64
    rng = np.random.default_rng(0)
    still = shuffle.quality(np.arange(rows), batch)
    assert still["moved"] == 0
    assert still["clumps"] == pytest.approx(batch, rel=0.02)
    perfect = shuffle.quality(rng.permutation(rows), batch)
    assert perfect["moved"] == pytest.approx(1 / 3, rel=0.02)
    assert perfect["50 %"] == pytest.approx(0.293, rel=0.03)
    assert perfect["clumps"] == pytest.approx(1, rel=0.2)


def test_a_shuffle_buffer_is_that_of_the_plain_loop():
    rows, size = 500, 40
    slots = np.random.default_rng(3).integers(0, size, rows - size)
    buffer, want = list(range(size)), []
    for step, slot in enumerate(slots):
        want.append(buffer[slot])
        buffer[slot] = size + step
    found = shuffle.buffered(rows, size, np.random.default_rng(3))
    assert found[: rows - size].tolist() == want
    assert sorted(found[rows - size :].tolist()) == sorted(buffer)
