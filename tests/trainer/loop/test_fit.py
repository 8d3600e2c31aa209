"""The loop: what it trains, what it leaves alone, when it stops, and that it does the same thing twice."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.data.negatives.samplers import UniformNegatives
from recpress.data.stream.batch import BatchBuilder
from recpress.data.stream.loader import Interactions
from recpress.modules.config import LossConfig
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig, MetricsConfig, OptimizerConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.loop import run_state
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.precision import GradientScale
from recpress.trainer.model.sharding import shard
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.rec_metrics import RecMetrics
from tests.fake_cuda import CUDA, backward, fake_rank, ready, without_waiting
from tests.modules.hashing.keyed_cases import id_map
from tests.ranks import run_on_ranks
from tests.trainer.small import (
    CPU,
    ITEMS,
    NEGATIVES,
    ROWS,
    USERS,
    batches,
    config,
    digest,
    frozen_bits,
    sharded,
    sides,
)


def train(strategy, kind="residual", **settings):
    dmp, optimizer = sharded(strategy, kind)
    result = fit(dmp, optimizer, batches, FitConfig(epochs=2, **settings), device=CPU, show_progress=False)
    return dmp, result


def learns_and_repeats():
    found = {}
    for strategy in ("random", "warm-start", "frozen", "frozen+residual"):
        first, result = train(strategy, log_every=3)
        again, _ = train(strategy)
        assert digest(first) == digest(again), strategy
        assert result.losses[-1] < result.losses[0], strategy
        found[strategy] = result.losses
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_losses_fall_and_the_same_seed_gives_the_same_bits(world):
    per_rank = run_on_ranks(learns_and_repeats, world)
    assert all(losses == per_rank[0] for losses in per_rank)  # the mean over the ranks, on all of them


def frozen_after_training():
    found = []
    for layout in ("row_wise", "table_wise"):
        dmp, optimizer = sharded("frozen+residual", layout=layout)
        before, weights = frozen_bits(dmp), digest(dmp)
        fit(dmp, optimizer, batches, FitConfig(epochs=2), device=CPU, show_progress=False)
        assert digest(dmp) != weights
        assert all(torch.equal(a, b) for a, b in zip(before, frozen_bits(dmp), strict=True))
        held = [key for key in dmp.fused_optimizer.state_dict()["state"] if "plus" not in key]
        assert not held
        assert not any("frozen" in name for name, _ in dmp.named_parameters())
        found.append(sum(len(bits) for bits in before))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_tables_keep_their_bits_and_have_no_state(world):
    rows = run_on_ranks(frozen_after_training, world)
    assert [sum(each) for each in zip(*rows, strict=True)] == [70, 70]  # 40 users, 30 items


def evaluates(folder):
    dmp, optimizer = sharded("frozen")
    start, calls, seen = digest(dmp), [], []

    def evaluate():
        assert not dmp.training
        seen.append(digest(dmp))
        calls.append(1)
        # the third is the best, and then it falls; only rank 0's number counts
        value = [0.1, 0.2, 0.3, 0.2, 0.1, 0.0, 0.0][len(calls) - 1] + dist.get_rank()
        return {"NDCG@10": value}

    settings = FitConfig(epochs=5, evaluate_every=1, evaluate_steps=4, evaluate_first=True, patience=2, log_every=2)
    with MetricsLog(folder) as log:
        result = fit(dmp, optimizer, batches, settings, device=CPU, evaluate=evaluate, log=log, show_progress=False)
    assert seen[0] == start
    assert digest(dmp) == seen[2] != seen[4]
    # at the start, after step 4, at the end of epoch 1 (6), after step 8 and at the end of epoch 2 (12)
    assert [int(e["step"]) for e in result.evaluations] == [0, 4, 6, 8, 12]
    assert result.steps == 12
    assert result.best["step"] == 6
    return result.steps


def test_early_stopping_and_the_best_weights(tmp_path):
    assert run_on_ranks(evaluates, 2, str(tmp_path)) == [12, 12]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluate/NDCG@10" in line] == [0, 4, 6, 8, 12]
    losses = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(line["train/loss"]) and line["train/rows_per_second"] > 0 for line in losses)
    assert list(tmp_path.glob("events.out.tfevents*"))


def accepts_later():
    """0.5 (the start), 0.9 (refused), 0.6 (accepted), 0.7 (refused), 0.4: patience counts all of them."""
    dmp, optimizer = sharded("frozen")
    values, seen = iter([0.5, 0.9, 0.6, 0.7, 0.4]), []

    def evaluate():
        seen.append(digest(dmp))
        return {"m": next(values)}

    settings = FitConfig(epochs=6, evaluate_every=1, evaluate_first=True, patience=3, metric="m")
    given = {"evaluate": evaluate, "accept": lambda found: found["m"] == 0.6 and dist.get_rank() == 0}
    result = fit(dmp, optimizer, batches, settings, device=CPU, show_progress=False, **given)
    assert digest(dmp) == seen[2]
    return [int(e["epoch"]) for e in result.evaluations], result.best["m"]


def test_what_is_not_accepted_is_not_the_best_and_still_counts_for_patience():
    assert run_on_ranks(accepts_later, 2) == [([0, 1, 2, 3, 4], 0.6)] * 2


def looking_changes_nothing():
    plain, _ = train("warm-start")
    looked, _ = train("warm-start", evaluate_steps=2, keep_best=False, metric="m")
    dmp, optimizer = sharded("warm-start")
    settings = FitConfig(epochs=2, evaluate_steps=2, keep_best=False, metric="m")
    fit(dmp, optimizer, batches, settings, device=CPU, evaluate=lambda: {"m": 0.0}, show_progress=False)
    return digest(plain) == digest(looked) == digest(dmp)


def test_evaluating_in_the_middle_of_an_epoch_leaves_the_training_as_it_was():
    assert run_on_ranks(looking_changes_nothing, 2) == [True, True]


def meets_nan(bad_rank):
    dmp, optimizer = sharded("frozen")
    bad = 4 if dist.get_rank() == bad_rank else None
    fit(
        dmp,
        optimizer,
        lambda epoch, first: batches(epoch, first, bad_step=bad if epoch == 1 else None),
        FitConfig(epochs=2, log_every=3),
        device=CPU,
        show_progress=False,
    )


def test_a_loss_that_is_no_number_names_its_step():
    with pytest.raises(InputError, match=r"non-finite loss nan at step 11, epoch 2"):
        run_on_ranks(meets_nan, 1, 0)


def skips(strategy, bad_step):
    """Weights and result of a run over two epochs; the rank has a batch with a NaN label, or leaves that batch out."""
    dmp, optimizer = sharded(strategy)
    made = {0: batches(0, bad_step=bad_step), 1: batches(1)}
    if bad_step is None:
        del made[0][4]
    settings = FitConfig(epochs=2, log_every=4, on_nonfinite="skip")
    result = fit(dmp, optimizer, lambda epoch, _: made[epoch], settings, device=CPU, show_progress=False)
    return digest(dmp), result.skipped, all(map(math.isfinite, result.losses))


@pytest.mark.parametrize("strategy", ["warm-start", "frozen+residual"])
def test_a_batch_without_a_finite_loss_can_be_left_out(strategy):
    (left_out,) = run_on_ranks(skips, 1, strategy, 4)
    (without,) = run_on_ranks(skips, 1, strategy, None)
    assert left_out == (without[0], 1, True)


def skips_on_one(strategy):
    return skips(strategy, 4 if dist.get_rank() == 1 else 99)


def test_a_bad_batch_on_one_rank_is_counted_on_all_and_spoils_nothing():
    (first, second) = run_on_ranks(skips_on_one, 2, "warm-start")
    assert first[1:] == second[1:] == (1, True)


def wants_another_metric():
    dmp, optimizer = sharded("frozen")
    settings = FitConfig(evaluate_every=1, metric="NDCG@7")
    fit(dmp, optimizer, batches, settings, device=CPU, evaluate=lambda: {"HR@10": 0.0}, show_progress=False)


def test_a_metric_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match=r"metric 'NDCG@7' is not among those of the evaluation: HR@10"):
        run_on_ranks(wants_another_metric, 1)


def without_labels():
    dmp, optimizer = sharded("frozen")

    def zeros(epoch, first):
        made = batches(epoch, first)
        for batch in made:
            batch.label.zero_()
        return made

    with pytest.raises(InputError, match="each row that was trained on has the label 0"):
        fit(dmp, optimizer, zeros, FitConfig(epochs=2), device=CPU, show_progress=False)


def test_labels_that_are_all_zero_are_refused():
    run_on_ranks(without_labels, 1)


def finds_a_bad_id_where_it_logs():
    def with_a_bad_id(epoch, first):
        found = batches(epoch, first)
        found[1].user_features.values()[3] = USERS
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recpress.modules.frozen.kernel.host_reads", lambda ids: False)  # as on CUDA
        dmp, optimizer = sharded("frozen", layout="table_wise")
        with pytest.raises(ValueError, match=f"feature 'user' has the id {USERS}, expected 0 to {USERS - 1}"):
            fit(dmp, optimizer, with_a_bad_id, FitConfig(epochs=1, log_every=3), device=CPU, show_progress=False)
    return optimizer.steps


def test_an_id_out_of_range_that_no_step_waits_for_ends_the_run_at_the_next_log_line():
    assert run_on_ranks(finds_a_bad_id_where_it_logs, 1) == [3]


def test_training_on_a_device_ends_as_on_a_cpu(device, tmp_path):
    """With the pipeline, its streams, and a checkpoint that another model continues from."""
    losses, describe = {}, {"config": {}, "inputs": {}}
    for name in dict.fromkeys(("cpu", device.type)):
        with process_group(name) as ranks:
            dmp, optimizer = sharded("frozen+residual", device=ranks.device)
            result = fit(
                dmp, optimizer, batches, FitConfig(epochs=2, log_every=3), device=ranks.device, show_progress=False
            )
            losses[name] = result.losses
            saved = tmp_path / name
            with Checkpoints(CheckpointConfig(steps=1), saved, describe) as checkpoints:
                checkpoints.save(run_state.collect(dmp, optimizer, None, ranks.device), {"world": 1}, 12)
            with Checkpoints(CheckpointConfig(steps=1), saved, describe) as checkpoints:
                other, again = sharded("frozen+residual", device=ranks.device)
                assert digest(other) != digest(dmp)
                run_state.load(checkpoints.start, other, again, None, ranks.device, checkpoints.group)
                assert digest(other) == digest(dmp)
            del dmp, other, optimizer, again
    assert losses[device.type] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["cpu"][-1] < losses["cpu"][0]


@pytest.mark.parametrize("loss", [LossConfig(kind="bce"), LossConfig(kind="softmax", in_batch=True)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("strategy", "storage", "hashed"),
    [
        ("random", "fp32", False),
        ("random", "fp32", True),
        ("frozen", "int8", True),
        ("frozen", "int4", False),
        ("frozen+residual", "fp16", False),
    ],
)
def test_on_cuda_no_step_of_the_two_tower_waits(monkeypatch, strategy, storage, hashed, shared, loss):
    """Batch, forward, backward, optimizers, metrics. Only the pipeline, which needs CUDA streams, is not part of it."""
    monkeypatch.setattr("recpress.modules.hashing.learned_hash.map_fingerprint", lambda _: torch.zeros(16))  # of numpy
    network = config(strategy)
    network = replace(network, tables=replace(network.tables, storage=storage), loss=loss)
    maps = [id_map(count, 5, rows_per_id=2, weighted=True) if hashed else None for count in (USERS, ITEMS)]
    with fake_rank():
        model = TwoTower(
            network, *(replace(s, map=m) for s, m in zip(sides(), maps, strict=True)), tables_device="meta"
        )
        model.skip_nonfinite = True
        dmp = ready(shard(model, CUDA, batch_size=ROWS))
        optimizer = TrainOptimizer(dmp, OptimizerConfig(clip_norm=1.0), 9, ema=0.9)
        optimizer.skip_nonfinite, optimizer.ends_step = True, False
        optimizer.scale = GradientScale(dmp, CUDA)
        metrics = RecMetrics(MetricsConfig(window=100, negatives=1), model.loss, rows=ROWS, device=CUDA)
        build = BatchBuilder(UniformNegatives(ITEMS, NEGATIVES), shared=shared, device=CUDA)
        ids = torch.empty(ROWS, dtype=torch.int64, device="cpu")
        rows = Interactions(ids, ids, None, None, {}, None, epoch=0, step=1, position=ROWS, size=ROWS)

        def step():
            batch = build(rows)
            optimizer.zero_grad()
            found, _ = dmp(batch)
            backward(found * optimizer.scale.factor, dmp)
            optimizer.step()
            optimizer.ends_step = not optimizer.ends_step  # steps of two batches
            return found

        assert without_waiting(step).device == CUDA
        assert metrics._window.device == CUDA
