"""AUC, NE, log loss and calibration of all ranks are those of all rows together."""

import math

import pytest
import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.evaluate import binary
from recpress.trainer.evaluate.binary import BinaryMetrics
from recpress.trainer.evaluate.metrics import pointwise_auc
from tests.ranks import run_on_ranks

ROWS = 1000


def rows():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(ROWS, generator=generator)
    return p, (torch.rand(ROWS, generator=generator) < p).float()


def computed():
    """Rank 0 has 400 rows, and the last rank the others."""
    p, y = rows()
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(None) if world == 1 else slice(0, 400) if rank == 0 else slice(400, None)
    metrics = BinaryMetrics()
    for part in zip(p[mine].split(90), y[mine].split(90), strict=True):
        metrics.add(*part)
    return metrics.compute()


@pytest.mark.parametrize("world", [1, 2])
def test_metrics_are_those_of_all_rows(world):
    found = run_on_ranks(computed, world)
    assert all(of_rank == found[0] for of_rank in found)
    p, y = (part.double() for part in rows())
    loss = float(torch.nn.functional.binary_cross_entropy(p, y))
    mean = float(y.mean())
    entropy = -(mean * math.log(mean) + (1 - mean) * math.log(1 - mean))
    assert found[0]["AUC"] == pytest.approx(pointwise_auc(p, y), abs=1e-6)
    assert found[0]["LogLoss"] == pytest.approx(loss)
    assert found[0]["NE"] == pytest.approx(loss / entropy)
    assert found[0]["Calibration"] == pytest.approx(float(p.sum() / y.sum()))
    assert found[0]["rows"] == ROWS


def test_auc_of_many_rows_is_of_an_even_share(monkeypatch):
    monkeypatch.setattr(binary, "AUC_ROWS", 500)
    (found,) = run_on_ranks(computed, 1)
    p, y = rows()
    assert found["AUC"] == pytest.approx(pointwise_auc(p[::2], y[::2]), abs=1e-6)
    assert found["rows"] == ROWS


def not_finite():
    metrics = BinaryMetrics()
    metrics.add(torch.tensor([0.5, math.nan]), torch.ones(2))
    return metrics.compute()


def test_a_prediction_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        run_on_ranks(not_finite, 1)


def of_one_label_and_logits():
    found = []
    for label in (0.0, 1.0):
        metrics = BinaryMetrics()
        metrics.add(torch.tensor([0.25, 0.5]), torch.full((2,), label))
        found.append(metrics.compute())
    metrics = BinaryMetrics()
    metrics.add(torch.tensor([-1.5, 0.5]), torch.tensor([0.0, 1.0]))
    with pytest.raises(InputError, match=r"are in \[-1.5, 0.5\], expected probabilities in \[0, 1\]"):
        metrics.compute()
    return found


def test_rows_of_one_label_have_no_ne_and_logits_are_an_error():
    (found,) = run_on_ranks(of_one_label_and_logits, 1)
    assert [set(metrics) for metrics in found] == [{"LogLoss", "Calibration", "rows"}] * 2
    assert found[1]["LogLoss"] == pytest.approx(math.log(8) / 2)
