"""The readers that are compared give the same rows, and what is measured of a shuffle is what it says."""

import pytest
import torch

from recpress.benchmarks import readers, synthetic_logs
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
