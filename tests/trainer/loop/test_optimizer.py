"""Schedules, clipping, and that one schedule drives both optimizers."""

import math

import pytest
import torch

from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.optimizer import schedule_factor
from tests.ranks import run_on_ranks
from tests.trainer.small import batches, sharded


def test_schedules():
    constant = OptimizerConfig(schedule="constant", warmup_steps=4)
    assert [schedule_factor(constant, s, 10) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimizerConfig(schedule="linear", warmup_steps=2)
    assert [schedule_factor(linear, s, 10) for s in (1, 2, 6, 10, 11)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    cosine = OptimizerConfig(schedule="cosine")
    assert schedule_factor(cosine, 0, 8) == 1.0
    assert schedule_factor(cosine, 2, 8) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule_factor(cosine, 8, 8) == pytest.approx(0.0)


def steps_of(strategy, **settings):
    """(largest change of a table, of the dense part) at each of three steps."""
    dmp, optimizer = sharded(strategy, total_steps=2, **settings)
    found = []
    for batch in batches(0, steps=3):
        table = [
            s.tensor.clone() for v in dmp.state_dict().values() if hasattr(v, "local_shards") for s in v.local_shards()
        ]
        dense = [p.detach().clone() for p in optimizer.parameters]
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
        now = [s.tensor for v in dmp.state_dict().values() if hasattr(v, "local_shards") for s in v.local_shards()]
        moved = [
            max((float((a - b.detach()).abs().max()) for a, b in zip(x, y, strict=True)), default=0.0)
            for x, y in ((table, now), (dense, optimizer.parameters))
        ]
        found.append(moved)
    return found


def falls_to_zero():
    return steps_of("warm-start", schedule="linear")


@pytest.mark.parametrize("world", [1, 2])
def test_the_schedule_drives_tables_and_dense_part(world):
    for first, second, third in run_on_ranks(falls_to_zero, world):
        assert min(first) > 0
        assert min(second) > 0
        assert third == [0.0, 0.0]  # the factor is 0 from step 2 on


def clipped():
    dmp, optimizer = sharded("frozen", clip_norm=1e-3)
    batch = batches(0)[0]
    optimizer.zero_grad()
    (1000.0 * dmp(batch)[0]).backward()
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in optimizer.parameters]).norm()
    return float(norm), [float(p.grad.sum()) for p in optimizer.parameters]


def test_clipping_bounds_the_norm_alike_on_all_ranks():
    (norm, gradients), other = run_on_ranks(clipped, 2)
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert (norm, gradients) == other
