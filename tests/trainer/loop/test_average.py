"""The average of the dense weights: its formula, what evaluations and the published model have, and checkpoints."""

import pytest
import torch

from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.loop import run_state
from recpress.trainer.loop.average import WeightAverage
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, sharded

DECAY = 0.8


def test_the_shares_of_the_steps():
    weight = torch.nn.Parameter(torch.tensor([100.0]))
    average, seen = WeightAverage([weight], DECAY), []
    for step in range(1, 6):
        with torch.no_grad():
            weight.fill_(step**2)
        average.update(step)
        seen.append(float(step**2))
        shares = [DECAY ** (step - k) for k in range(1, step + 1)]
        expected = sum(share * value for share, value in zip(shares, seen, strict=True)) / sum(shares)
        assert float(average.values[0]) == pytest.approx(expected, rel=1e-5)
    with average.in_model():
        assert torch.equal(weight.detach(), average.values[0])
    assert float(weight) == 25.0


def steps_by_hand(strategy):
    """The dense weights after each step of a run without an average."""
    seen = []
    dmp, optimizer = sharded(strategy)
    step = optimizer.step

    def watched():
        step()
        seen.append([p.detach().clone() for p in optimizer.parameters])

    optimizer.step = watched
    fit(dmp, optimizer, batches, FitConfig(epochs=2), device=CPU, show_progress=False)
    return seen


def averages(strategy, keep_best):
    weights = steps_by_hand(strategy)
    dmp, optimizer = sharded(strategy, ema=DECAY)
    evaluated, values = [], iter([1.0, 2.0, 1.0])

    def evaluate():
        evaluated.append([p.detach().clone() for p in optimizer.parameters])
        return {"m": next(values)}

    config = FitConfig(epochs=2, evaluate_steps=4, metric="m", keep_best=keep_best)
    fit(dmp, optimizer, batches, config, device=CPU, evaluate=evaluate, show_progress=False)
    for given, last in zip(evaluated, (4, 8, 12), strict=True):
        shares = [DECAY ** (last - step) for step in range(1, last + 1)]
        for k, found in enumerate(given):
            mean = sum(share * step[k] for share, step in zip(shares, weights[:last], strict=True)) / sum(shares)
            torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)
    published = evaluated[1 if keep_best else 2]
    assert all(torch.equal(a.detach(), b) for a, b in zip(optimizer.parameters, published, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(published, weights[7 if keep_best else 11], strict=True))
    return float(sum(p.sum() for p in optimizer.parameters))


@pytest.mark.parametrize("keep_best", [True, False])
def test_evaluations_and_the_published_model_have_the_average_and_steps_do_not(keep_best):
    one, two = run_on_ranks(averages, 2, "frozen+residual", keep_best)
    assert one == two


def test_a_checkpoint_has_both(tmp_path):
    assert run_on_ranks(saves_both, 1, str(tmp_path)) == [True]


def saves_both(folder):
    dmp, optimizer = sharded(ema=DECAY)
    describe = {"config": {}, "inputs": {}}
    for batch in batches(0)[:3]:
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
    with Checkpoints(CheckpointConfig(steps=1), folder, describe) as checkpoints:
        checkpoints.save(run_state.collect(dmp, optimizer, None, CPU), {"world": 1}, 3)
    other, again = sharded(ema=DECAY)
    with Checkpoints(CheckpointConfig(steps=1), folder, describe) as checkpoints:
        run_state.load(checkpoints.start, other, again, None, CPU, checkpoints.group)
    pairs = [*zip(optimizer.parameters, again.parameters, strict=True)]
    pairs += zip(optimizer.average.values, again.average.values, strict=True)
    assert not torch.equal(optimizer.parameters[0], optimizer.average.values[0])
    return all(torch.equal(a, b) for a, b in pairs)
