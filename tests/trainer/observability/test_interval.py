"""Losses, speed and waiting time between two log lines."""

import math

import pytest
import torch
import torch.distributed as dist

from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.observability import interval as module
from recpress.trainer.observability.interval import Interval
from recpress.trainer.observability.metrics_log import MetricsLog
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, sharded


def test_waiting_counts_and_pauses_do_not(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    interval = Interval()
    with interval.waiting():
        clock[0] += 3
    with interval.pause():
        clock[0] += 100
    clock[0] += 1
    interval.add(torch.tensor(0.5), 10)
    found = interval.end()
    assert (found.seconds, found.waited, found.rows, found.losses.tolist()) == (4, 3, 10, [0.5])
    assert found.first_bad is None
    assert interval.losses == []


def reduces():
    interval, rank = Interval(), dist.get_rank()
    for loss in (1.0 + rank, math.nan if rank else 3.0):
        interval.add(torch.tensor(loss), 4)
    found = interval.end()
    found.reduce()
    return found.loss, found.skipped, found.first_bad is None, found.scalars()["train/loss"]


def test_ranks_are_combined_and_losses_that_are_not_finite_are_counted():
    first, second = run_on_ranks(reduces, 2)
    assert first == (pytest.approx(2.0), 1, True, pytest.approx(2.0))
    assert second == (pytest.approx(2.0), 1, False, pytest.approx(2.0))


def waits(clock):
    """The share of waiting of each log interval where a batch takes 3 seconds, and the rest of a step 1."""
    dmp, optimizer = sharded("frozen")
    step = optimizer.step

    def slow_step():
        clock[0] += 1
        step()

    def slow_batches(epoch, first):
        for batch in batches(epoch, first, steps=12):
            clock[0] += 3
            yield batch

    def evaluate():
        clock[0] += 1000
        return {"m": 0.0}

    optimizer.step, found = slow_step, []
    with MetricsLog(None) as log:
        log.write = lambda step, scalars: found.append((step, scalars.get("train/waiting")))
        settings = FitConfig(log_every=4, evaluate_steps=6, metric="m", keep_best=False)
        given = {"evaluate": evaluate, "log": log, "show_progress": False}
        fit(dmp, optimizer, slow_batches, settings, device=CPU, **given)
    return found


def test_waiting_is_the_share_of_the_time_in_which_the_next_batch_is_not_there(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    [found] = run_on_ranks(waits, 1, clock)
    shares = {step: share for step, share in found if share is not None}
    # the pipeline takes two batches in advance in the first interval, and none at the end
    assert shares == pytest.approx({4: 18 / 22, 6: 6 / 8, 8: 6 / 8, 12: 6 / 10})
