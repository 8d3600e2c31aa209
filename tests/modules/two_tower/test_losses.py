"""Losses against plain loops and against what they estimate."""

import math

import pytest
import torch

from recpress.modules.config import LossConfig
from recpress.modules.two_tower.losses import make_loss

ROWS, NEGATIVES, DIM, ITEMS = 5, 3, 4, 11


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    users = torch.randn(ROWS, DIM, generator=generator)
    table = torch.randn(ITEMS, DIM, generator=generator)
    ids = torch.randint(ITEMS, (ROWS * (1 + NEGATIVES),), generator=generator)
    ids[ROWS + 1] = ids[0]  # a negative of row 0 is its own positive
    ids[2] = ids[1]  # two rows with the same positive
    label = torch.rand(ROWS, generator=generator)
    log_q = torch.rand(ids.shape[0], generator=generator).log()
    return users, table, ids, label, log_q


def negatives_of(row):
    return range(ROWS + row * NEGATIVES, ROWS + (row + 1) * NEGATIVES)


def test_binary_cross_entropy_is_the_mean_over_all_pairs(batch):
    users, table, ids, label, log_q = batch
    loss = make_loss(LossConfig(kind="bce", scale=2.0, bias=-0.5), ITEMS)
    total = 0.0
    for row in range(ROWS):
        for place, target in [(row, float(label[row])), *((n, 0.0) for n in negatives_of(row))]:
            p = 1 / (1 + math.exp(-(2.0 * float(users[row] @ table[ids[place]]) - 0.5)))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    found = loss(users, table[ids], label, log_q, ids)
    assert found.item() == pytest.approx(total / (ROWS * (1 + NEGATIVES)), rel=1e-5)


@pytest.mark.parametrize("in_batch", [False, True])
def test_sampled_softmax_is_what_its_formula_says(batch, in_batch):
    users, table, ids, label, log_q = batch
    loss = make_loss(LossConfig(kind="softmax", scale=1.5, in_batch=in_batch), ITEMS)
    count = NEGATIVES + (ROWS - 1 if in_batch else 0)
    total = 0.0
    for row in range(ROWS):
        own = math.exp(1.5 * float(users[row] @ table[ids[row]]))
        places = [*negatives_of(row), *(range(ROWS) if in_batch else ())]
        others = sum(
            math.exp(1.5 * float(users[row] @ table[ids[p]])) / (count * math.exp(float(log_q[p])))
            for p in places
            if ids[p] != ids[row]
        )
        total -= float(label[row]) * math.log(own / (own + others))
    found = loss(users, table[ids], label, log_q, ids)
    assert found.item() == pytest.approx(total / float(label.sum()), rel=1e-5)


@pytest.mark.parametrize("in_batch", [False, True])
def test_sampled_softmax_with_many_candidates_is_the_full_softmax(in_batch):
    """Candidates are drawn by an uneven q: without the correction the result is far off."""
    generator = torch.Generator().manual_seed(0)
    q = torch.tensor([0.6, 0.2, 0.05, 0.05, 0.025, 0.025, 0.025, 0.025])
    table, user = torch.randn(8, 3, generator=generator), torch.randn(1, 3, generator=generator)
    rows, negatives = (4000, 0) if in_batch else (1, 40_000)
    ids = torch.multinomial(q, rows * (1 + negatives), replacement=True, generator=generator)
    ids[0] = 5
    label = torch.zeros(rows)
    label[0] = 1.0
    loss = make_loss(LossConfig(kind="softmax", scale=1.0, in_batch=in_batch), ITEMS)
    found = loss(user.expand(rows, 3), table[ids], label, q.log()[ids], ids)
    full = -torch.log_softmax(user @ table.T, 1)[0, 5]
    assert found.item() == pytest.approx(float(full), abs=0.03)
    uncorrected = loss(user.expand(rows, 3), table[ids], label, torch.full_like(q, 1 / 8).log()[ids], ids)
    assert abs(uncorrected.item() - float(full)) > 0.1


def test_scale_stays_positive_and_learns(batch):
    users, table, ids, label, log_q = batch
    loss = make_loss(LossConfig(kind="bce", scale=2.0), ITEMS)
    loss(users, table[ids], label, log_q, ids).backward()
    assert loss.logits.log_scale.grad is not None
    assert loss.logits.bias.grad is not None
    with torch.no_grad():
        loss.logits.log_scale.sub_(100.0)
    assert (loss.logits(torch.tensor(1.0)) - loss.logits(torch.tensor(0.0))).item() >= 0


@pytest.mark.parametrize("kind", ["bce", "softmax"])
def test_shared_negatives_leave_out_the_positives_of_each_user(kind):
    generator = torch.Generator().manual_seed(4)
    users, table = torch.randn(3, DIM, generator=generator), torch.randn(ITEMS, DIM, generator=generator)
    ids = torch.tensor([0, 1, 2, 5, 6, 0, 7])  # three positives, four shared negatives
    excluded = torch.tensor([[True, False, False, False], [False] * 4, [False, False, True, False]])
    label, log_q = torch.ones(3), torch.full((7,), -math.log(ITEMS))
    # a choice among 3: the positive and two of the 11 items
    loss = make_loss(LossConfig(kind=kind, scale=1.0, bias=0.0, candidates=3 if kind == "softmax" else 0), ITEMS)
    found = loss(users, table[ids], label, log_q, ids, excluded)
    logits = (users @ table[ids].T).tolist()
    entropies, softmaxes, pairs = 0.0, 0.0, 3
    for row in range(3):
        own = logits[row][row]
        kept = [logits[row][3 + j] for j in range(4) if not excluded[row, j]]
        pairs += len(kept)
        entropies += math.log1p(math.exp(-own)) + sum(math.log1p(math.exp(x)) for x in kept)
        others = [logits[row][3 + j] for j in range(4) if not excluded[row, j] and ids[3 + j] != ids[row]]
        softmaxes += math.log(math.exp(own) + 2 / 4 * sum(map(math.exp, others))) - own
    assert found.item() == pytest.approx(entropies / pairs if kind == "bce" else softmaxes / 3, rel=1e-5)
