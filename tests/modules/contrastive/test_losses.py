"""The closed gradients against autograd of the losses as their formulas state them."""

import pytest
import torch

from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.losses import Scores, make_loss

ITEMS = 50


def reference(config: ContrastiveConfig, s: Scores) -> torch.Tensor:
    """The formulas of the module, one positive at a time."""
    t, total = config.temperature, torch.zeros((), dtype=torch.float64)
    estimate = torch.exp(-s.log_expected.double())
    for k, row in enumerate(s.row.tolist()):
        positive, negative, weight = s.positive[k].double(), s.negative[row].double(), s.weight[k].double()
        if config.loss == "softmax":
            others = torch.exp(positive / t) + (torch.exp(negative / t) * estimate).sum()
            total = total + weight * (torch.log(others) - positive / t)
        elif config.loss == "ccl":
            above = torch.clamp(negative - config.margin, min=0)
            total = total + weight * (1 - positive + config.negative_weight / ITEMS * (above * estimate).sum())
        else:
            others = (torch.log1p(torch.exp(negative / t)) * estimate).sum()
            of_positive = torch.log1p(torch.exp(-positive / t))
            total = total + weight * (of_positive + config.negative_weight / ITEMS * others)
    return total


def scores(requires_grad: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(3)
    row = torch.tensor([0, 0, 1, 3, 3, 3])  # user 2 has no positives
    weight = torch.tensor([1.0, 1.0, 0.5, 2.0, 2.0, 2.0])
    return Scores(
        positive=(torch.rand(6, generator=generator) * 2 - 1).requires_grad_(requires_grad),
        negative=(torch.rand(4, 9, generator=generator) * 2 - 1).requires_grad_(requires_grad),
        row=row,
        weight=weight,
        row_weight=torch.zeros(4).index_add_(0, row, weight),
        log_expected=torch.randn(9, generator=generator),
        num_items=ITEMS,
    )


@pytest.mark.parametrize("loss", ["softmax", "ccl", "logistic"])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_loss_and_gradients(loss, temperature):
    config = ContrastiveConfig(loss=loss, temperature=temperature, margin=0.2, negative_weight=30.0)
    dense = scores(requires_grad=True)
    expected = reference(config, dense)
    expected.backward()
    found, positive, negative = make_loss(config)(scores())
    torch.testing.assert_close(float(found), float(expected.detach()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positive, dense.positive.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(negative, dense.negative.grad, rtol=1e-4, atol=1e-4)
