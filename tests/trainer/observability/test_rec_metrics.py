"""TorchRec's metrics of a run: against their formulas, on two ranks, and after a resume."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recpress.modules.two_tower.losses import make_loss
from recpress.modules.two_tower.predictions import Predictions
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig, MetricsConfig
from recpress.trainer.loop import run_state
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.rec_metrics import RecMetrics
from tests.ranks import run_on_ranks
from tests.trainer import small
from tests.trainer.small import CPU, ROWS, batches, digest, sharded


def formulas(probability, label, weight):
    """NE, AUC and calibration in numpy, pair by pair, without ties; and what ties may add to the AUC: TorchRec's takes
    equal scores in any order."""
    p, y, w = (np.asarray(x, dtype=np.float64) for x in (probability, label, weight))
    rate = (w * y).sum() / w.sum()
    entropy = -(w * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum()
    alone = -w.sum() * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    above = p[:, None] > p[None, :]
    ties = p[:, None] == p[None, :]
    both = (w * y)[:, None] * (w * (1 - y))[None, :]
    return {
        "ne": entropy / alone,
        "auc": (above * both).sum() / both.sum(),
        "calibration": (w * p).sum() / (w * y).sum(),
    }, (ties * both).sum() / both.sum()


def told(rank, step):
    rng = np.random.default_rng([rank, step])
    count = 30 + 7 * rank
    label = (rng.random(count) < 0.3).astype(np.float32)
    return np.stack([rng.uniform(0.05, 0.95, count) * 0.7 + 0.2 * label, label, rng.choice([0.0, 1.0, 2.5], count)])


def of_all_ranks(steps, window):
    rank = dist.get_rank()
    loss = make_loss(small.config().loss, 10)
    metrics = RecMetrics(MetricsConfig(window=window), loss, rows=60, device=CPU)
    for step in range(steps):
        loss.observer(Predictions(*torch.from_numpy(told(rank, step)).float()))
    return metrics.compute()


@pytest.mark.parametrize(("world", "steps", "window"), [(1, 2, 1000), (2, 1, 90), (2, 5, 101), (2, 5, 24)])
def test_the_window_of_all_ranks_is_measured(world, steps, window):
    found, *others = run_on_ranks(of_all_ranks, world, steps, window)
    each = -(-window // world)  # pairs that a rank keeps: its newest ones
    kept = [np.concatenate([told(r, s) for s in range(steps)], 1)[:, -each:] for r in range(world)]
    expected, ties = formulas(*np.concatenate(kept, 1))
    assert ties == 0
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(other == {} for other in others)


def with_a_bad_pair():
    loss = make_loss(small.config().loss, 10)
    metrics = RecMetrics(MetricsConfig(window=500), loss, rows=60, device=CPU)
    given = torch.from_numpy(told(0, 0)).float()
    bad = given.clone()
    bad[0, 3] = bad[1, 7] = torch.nan
    loss.observer(Predictions(*bad))
    keep = torch.ones(given.shape[1], dtype=torch.bool)
    keep[[3, 7]] = False
    return metrics.compute(), formulas(*given[:, keep].numpy())[0]


def test_a_pair_that_is_no_number_counts_nothing():
    [(found, expected)] = run_on_ranks(with_a_bad_pair, 1)
    assert found == pytest.approx(expected, rel=1e-5)


def while_training(folder):
    """The last line of a run whose weights stay as they are, and the pairs of its last two steps by the vectors."""
    dmp, optimizer = sharded("frozen", learning_rate=0.0)
    module, pairs = dmp.module, ROWS * (1 + small.NEGATIVES)
    module = getattr(module, "module", module)
    metrics = RecMetrics(
        MetricsConfig(window=2 * pairs * dist.get_world_size(), negatives=0), module.loss, rows=0, device=CPU
    )
    with MetricsLog(folder) as log:
        config = FitConfig(log_every=3)
        fit(dmp, optimizer, batches, config, device=CPU, show_progress=False, log=log, metrics=metrics)
    dmp.eval()
    found = []
    for batch in batches(0)[-2:]:
        users, items = module.user_vectors(batch.user_features), module.item_vectors(batch.item_features)
        dots = torch.cat(
            [
                (users * items[:ROWS]).sum(1),
                (users[:, None] * items[ROWS:].view(ROWS, -1, items.shape[1])).sum(2).flatten(),
            ]
        )
        found.append(module.loss.logits(dots).sigmoid().detach().numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_reports_what_its_network_predicts(tmp_path, world):
    probability = np.concatenate(run_on_ranks(while_training, world, str(tmp_path)))
    label = np.tile(np.arange(ROWS * (1 + small.NEGATIVES)) < ROWS, 2 * world)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected, ties = formulas(probability, label, np.ones(len(label)))
    found = {name: lines[-1][f"train/{name}"] for name in expected}
    assert expected["auc"] - 1e-4 < found["auc"] < expected["auc"] + ties + 1e-4
    assert found | {"auc": expected["auc"]} == pytest.approx(expected, rel=1e-4)
    assert ties < 0.01


class Killed(RuntimeError):
    pass


def run(folder, crash=None, window=150):
    """Bits, and every line with its metrics but those of the clock."""
    dmp, optimizer = sharded("warm-start")
    step = optimizer.step

    def counted():
        if optimizer.steps == crash:
            raise Killed
        step()

    optimizer.step = counted
    describe = {"config": {}, "inputs": {}, "global_batch": ROWS * dist.get_world_size()}
    checkpoints = Checkpoints(CheckpointConfig(steps=5, minutes=0), folder, describe)
    module = getattr(dmp.module, "module", dmp.module)
    metrics = None
    if window:
        metrics = RecMetrics(MetricsConfig(window=window), module.loss, rows=32, device=CPU)
    with checkpoints, MetricsLog(checkpoints.metrics, tensorboard=False) as log:
        try:
            config, given = FitConfig(epochs=3, log_every=3), {"checkpoints": checkpoints, "metrics": metrics}
            fit(dmp, optimizer, batches, config, device=CPU, show_progress=False, log=log, **given)
        except Killed:
            checkpoints.wait()
            return None
    lines = [json.loads(line) for line in (checkpoints.metrics / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/ne", "train/auc", "train/calibration")
    assert run_state.weights(dmp)
    return digest(dmp), [[line.get(name) for name in names] for line in lines if line["step"] % 3 == 0]


def crash_then_resume(folder, crash, before=150, after=150):
    assert run(folder, crash, before) is None
    return run(folder, None, after)


@pytest.mark.parametrize("world", [1, 2])
def test_after_a_resume_the_metrics_are_those_of_the_undisturbed_run(tmp_path, world):
    quiet = run_on_ranks(run, world, tmp_path / "quiet")
    assert run_on_ranks(crash_then_resume, world, tmp_path / "b", 13) == quiet
    assert quiet[0][1][-1][0] == 18
    assert all(value is not None for value in quiet[0][1][-1])


@pytest.mark.parametrize(("before", "after"), [(0, 150), (150, 70), (150, 0)])
def test_metrics_may_be_turned_on_and_off_when_a_run_goes_on(tmp_path, before, after):
    [(bits, _)] = run_on_ranks(run, 1, tmp_path / "quiet", None, 0)  # watching changes no weights either
    assert run_on_ranks(crash_then_resume, 1, tmp_path / "b", 8, before, after)[0][0] == bits
