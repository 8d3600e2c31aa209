"""Row-wise Adam against its formulas, one row at a time."""

import torch
import torch.nn.functional as F

from recpress.modules.contrastive.row_adam import BETA1, BETA2, RowAdam


def test_steps_follow_the_formulas_and_other_rows_rest():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    adam = RowAdam(start.clone())
    rows, momentum, second = start.double().clone(), torch.zeros(6, 4).double(), torch.zeros(6).double()
    for step in range(5):
        ids = torch.tensor([0, 2, 5] if step % 2 else [1, 2])
        by_unit = torch.randn(len(ids), 4, generator=generator)
        for row, upper in zip(ids.tolist(), by_unit.double(), strict=True):
            x = rows[row].clone().requires_grad_()
            (F.normalize(x, dim=0) * upper).sum().backward()
            momentum[row] = BETA1 * momentum[row] + (1 - BETA1) * x.grad
            second[row] = BETA2 * second[row] + (1 - BETA2) * x.grad.square().mean()
            rows[row] -= 0.1 * momentum[row] / second[row].sqrt()
        unit, inverse = adam.read(ids)
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(ids)))
        adam.step(ids, unit, inverse, by_unit.clone(), 0.1)
    torch.testing.assert_close(adam.rows.double(), rows, rtol=1e-4, atol=1e-5)
    assert torch.equal(adam.rows[3:5], start[3:5])
