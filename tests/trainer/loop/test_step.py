"""Steps of several batches: the dense part moves as on one large batch, tables with every batch."""

import pytest
import torch

from recpress.data.stream.batch import ITEM, USER, Batch
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, ROWS, batches, keyed, sharded


def merged(parts):
    """One batch of the rows of several."""
    items = [part.item_features[ITEM].values() for part in parts]
    return Batch(
        keyed(USER, torch.cat([part.user_features[USER].values() for part in parts])),
        keyed(ITEM, torch.cat([each[:ROWS] for each in items] + [each[ROWS:] for each in items])),
        torch.cat([part.label for part in parts]),
        torch.cat([part.log_q for part in parts]),
    )


def trained(strategy, make, accumulate, **optimizer_settings):
    """(dense weights, this rank's shards of the tables, result, learning rates at the end)."""
    settings = {"schedule": "linear", "warmup_steps": 2, "clip_norm": 0.5, **optimizer_settings}
    dmp, optimizer = sharded(strategy, "mlp", total_steps=8, **settings)
    config = FitConfig(epochs=2, accumulate=accumulate, log_every=1)
    result = fit(dmp, optimizer, make, config, device=CPU, show_progress=False)
    rates = optimizer.learning_rate, [group["lr"] for group in optimizer.fused.param_groups]
    tables = [value for value in dmp.state_dict().values() if hasattr(value, "local_shards")]
    shards = [shard.tensor for table in tables for shard in table.local_shards()]
    return [p.detach() for p in optimizer.parameters], shards, result, rates


def frozen_on_two_batches_or_a_large_one():
    def five(epoch, first):  # a step of each epoch is left with one batch
        return batches(epoch, first, steps=5)

    def three(epoch, first):
        made = batches(epoch, steps=5)
        return [merged(made[0:2]), merged(made[2:4]), made[4]][first:]

    several, _, result, rates = trained("frozen", five, 2)
    large, _, expected, expected_rates = trained("frozen", three, 1)
    start = sharded("frozen", "mlp")[1].parameters
    moved = max(float((a - b).abs().max()) for a, b in zip(large, start, strict=True))
    for a, b in zip(several, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * moved)
    assert moved > 1e-2
    assert (result.steps, result.rows, rates) == (expected.steps, expected.rows, expected_rates)
    losses = [(result.losses[k], expected.losses[k]) for k in range(6)]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in losses)
    return result.steps, float(sum(p.sum() for p in several))


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_tables_several_batches_are_one_large_batch(world):
    found = run_on_ranks(frozen_on_two_batches_or_a_large_one, world)
    assert found == [found[0]] * world
    assert found[0][0] == 6


def tables_beside_a_dense_part_that_does_not_move():
    settings = {"learning_rate": 0.0, "schedule": "constant", "warmup_steps": 0}
    found = [trained("random", lambda epoch, first: batches(epoch, first, steps=4), n, **settings) for n in (4, 1)]
    (_, several, result, _), (_, each, expected, _) = found
    assert (result.steps, expected.steps) == (2, 8)
    return all(torch.equal(a, b) for a, b in zip(several, each, strict=True))


def test_tables_are_updated_with_every_batch():
    assert run_on_ranks(tables_beside_a_dense_part_that_does_not_move, 2) == [True, True]


def stops_inside_an_epoch():
    """Patience ends the run after step 3, batch 6, of the first epoch; evaluations are between steps."""
    values = iter([3.0, 2.0, 1.0])
    dmp, optimizer = sharded("frozen")
    config = FitConfig(epochs=2, accumulate=2, evaluate_steps=1, patience=2, metric="m")

    def made(epoch, first):
        return batches(epoch, first, steps=9)

    result = fit(dmp, optimizer, made, config, device=CPU, evaluate=lambda: {"m": next(values)}, show_progress=False)
    return [int(e["step"]) for e in result.evaluations], result.rows


def test_evaluations_are_between_steps():
    assert run_on_ranks(stops_inside_an_epoch, 1) == [([1, 2, 3], 6 * ROWS)]
