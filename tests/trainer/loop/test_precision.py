"""Autocast, the gradient scale of fp16 with its tables, and devices that lack a precision."""

import pytest
import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.loop import precision
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.precision import GradientScale, check_precision, matmul_precision
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, sharded


def weights(dmp, optimizer):
    """(dense weights, this rank's shards of the tables)."""
    tables = [value for value in dmp.state_dict().values() if hasattr(value, "local_shards")]
    shards = [shard.tensor.clone() for table in tables for shard in table.local_shards()]
    return [p.detach().clone() for p in optimizer.parameters], shards


def trained(kind, epochs=2):
    dmp, optimizer = sharded("random", "mlp", clip_norm=0.1)
    seen = []

    def evaluate():
        with torch.no_grad():
            seen.append(dmp.module.user_vectors(batches(0)[0].user_features).dtype)
        return {"m": 0.0}

    config = FitConfig(epochs=epochs, precision=kind, log_every=1, evaluate_every=1, metric="m", keep_best=False)
    result = fit(dmp, optimizer, batches, config, device=CPU, evaluate=evaluate, show_progress=False)
    assert set(seen) == {torch.float32}
    return (*weights(dmp, optimizer), result.losses, optimizer)


def close_to_fp32():
    dense, tables, losses, _ = trained("fp32")
    for kind, tolerance in (("bf16", 2e-2), ("fp16", 2e-3)):
        other_dense, other_tables, other_losses, optimizer = trained(kind)
        assert other_losses == pytest.approx(losses, rel=tolerance)
        assert other_losses != losses
        assert all(p.dtype == torch.float32 for p in other_dense + other_tables)
        for ours, theirs in ((dense, other_dense), (tables, other_tables)):
            error = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
            assert error < (10 * tolerance) ** 2 * sum(float(a.square().sum()) for a in ours)
        assert (optimizer.scale is not None) == (kind == "fp16")
    return losses


@pytest.mark.parametrize("world", [1, 2])
def test_half_precision_trains_nearly_as_fp32_and_evaluates_in_fp32(world):
    assert len(set(map(tuple, run_on_ranks(close_to_fp32, world)))) == 1


def overflows(where):
    """A step with gradients that are not finite: of everything, or of the tables of one rank."""
    dmp, optimizer = sharded("random", "mlp")
    config = FitConfig(precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "FIRST_SCALE", 1e30 if where == "all" else 1024.0)
        if where == "tables":
            unscaled = GradientScale._unscaled

            def bad(self, gradient):
                return unscaled(self, gradient * (torch.inf if dist.get_rank() == 1 else 1.0))

            patch.setattr(GradientScale, "_unscaled", bad)
        before = weights(dmp, optimizer)
        fit(dmp, optimizer, lambda epoch, first: batches(0, steps=1), config, device=CPU, show_progress=False)
    after = weights(dmp, optimizer)
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(before, after, strict=True)]
    assert all(bool(torch.isfinite(tensor).all()) for part in after for tensor in part)
    return same, float(optimizer.scale.factor), optimizer.steps


def test_a_step_that_overflows_is_skipped_on_all_ranks():
    assert run_on_ranks(overflows, 2, "all") == [([True, True], pytest.approx(5e29), 1)] * 2


def test_tables_that_overflow_on_one_rank_skip_the_dense_update_on_all():
    assert run_on_ranks(overflows, 2, "tables") == [([True, False], 512.0, 1)] * 2  # rank 0's gradients count


def test_the_scale_halves_after_a_bad_step_and_doubles_after_many_good_ones(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    scale, found = GradientScale(torch.nn.Module(), CPU), []
    for bad in (0, 0, 1, 0, 0, 0, 0):
        scale.update(torch.tensor(float(bad)))
        found.append(float(scale.factor) / precision.FIRST_SCALE)
    assert found == [1, 1, 0.5, 0.5, 0.5, 1, 1]
    assert scale.check() == precision.FIRST_SCALE
    for _ in range(60):
        scale.update(torch.tensor(1.0))
    with pytest.raises(InputError, match="not finite"):
        scale.check()


def test_devices_that_lack_a_precision(monkeypatch):
    for name in ("fp32", "bf16", "fp16"):
        check_precision(name, CPU)
    with pytest.raises(InputError, match="tf32, which GPUs have; expected fp32, bf16 or fp16"):
        check_precision("tf32", CPU)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with pytest.raises(InputError, match="fp16, which this torch lacks on the device cpu"):
        check_precision("fp16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InputError, match="bf16, which Tesla T4 does not have"):
        check_precision("bf16", torch.device("cuda", 0))


def test_tf32_is_for_a_block_only():
    assert torch.get_float32_matmul_precision() == "highest"
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        with matmul_precision("highest"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
