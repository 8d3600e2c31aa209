"""What losses tell of their predictions: the same that the loss itself is made of."""

import pytest
import torch

from recpress.modules.config import LossConfig
from recpress.modules.two_tower.losses import make_loss

ROWS, NEGATIVES, DIM, ITEMS = 6, 5, 4, 40


def batch(shared):
    generator = torch.Generator().manual_seed(3)
    count = NEGATIVES if shared else ROWS * NEGATIVES
    ids = torch.randint(ITEMS, (ROWS + count,), generator=generator)
    ids[ROWS] = ids[0]  # a negative of row 0 is its own positive
    table = torch.randn(ITEMS, DIM, generator=generator)
    label, log_q = (torch.rand(size, generator=generator) for size in (ROWS, len(ids)))
    excluded = torch.rand(ROWS, NEGATIVES, generator=generator) < 0.3 if shared else None
    return torch.randn(ROWS, DIM, generator=generator), table[ids], label, log_q.log(), ids, excluded


def told(config, given, watched=0):
    """(value of the loss, what it told)."""
    loss, found = make_loss(config, ITEMS), []
    loss.observer, loss.observed = found.append, watched
    value = loss(*given)
    assert not found[0].probability.requires_grad
    return float(value), found[0]


@pytest.mark.parametrize("shared", [False, True])
def test_the_cross_entropy_of_the_told_pairs_is_the_loss(shared):
    value, found = told(LossConfig(kind="bce", scale=2.0, bias=-0.5), batch(shared))
    p, y = found.probability.double(), found.label.double()
    entropy = -(y * p.log() + (1 - y) * (1 - p).log())
    assert float((found.weight * entropy).sum() / found.weight.sum()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("in_batch", "candidates"), [(False, 0), (True, 0), (False, 20)])
def test_the_told_probabilities_of_a_row_of_softmax_are_those_of_its_choice(shared, in_batch, candidates):
    given = batch(shared)
    config = LossConfig(kind="softmax", scale=1.5, in_batch=in_batch, candidates=candidates)
    value, found = told(config, given)
    label = given[2]
    positive, of_row = found.probability[:ROWS], label
    assert float((-positive.log() * label).sum() / label.sum()) == pytest.approx(value, rel=1e-5)
    assert found.label.tolist() == [1.0] * ROWS + [0.0] * (len(found.label) - ROWS)
    parts = (found.probability * found.weight)[ROWS:].view(ROWS, -1).sum(1)
    assert torch.allclose(parts + positive * of_row, of_row, rtol=1e-5)  # the choice adds up to 1, times its weight


@pytest.mark.parametrize("kind", ["bce", "softmax"])
def test_a_part_of_the_negatives_stands_for_all_of_them(kind):
    given = (*batch(shared=True)[:-1], torch.zeros(ROWS, NEGATIVES, dtype=torch.bool))
    given[3].zero_()  # all drawn alike
    given[4][ROWS:] = torch.arange(ITEMS - NEGATIVES, ITEMS)  # and no positives
    given[4][:ROWS] = torch.arange(ROWS)
    _, some = told(LossConfig(kind=kind), given, watched=2)
    _, all_of_them = told(LossConfig(kind=kind), given)
    assert len(some.weight) == ROWS * 3
    assert float(some.weight.sum()) == pytest.approx(float(all_of_them.weight.sum()), rel=1e-5)
    each = all_of_them.probability[ROWS:].view(ROWS, NEGATIVES)
    picked = torch.stack([each[row, [2 * row % NEGATIVES, (2 * row + 1) % NEGATIVES]] for row in range(ROWS)])
    assert torch.equal(some.probability[ROWS:].view(ROWS, 2), picked)
