"""The warm-up: a factorization machine whose scaled vectors tell alike ids from others, and what sharing costs."""

import pytest
import torch

from recpress.modules.hashing.warm_up import FactorizationMachine, factor, warm_up

SIZES = [40, 6, 200]


def planted(rows=60_000, groups=4, seed=0):
    """Ids of the first and the last feature are alike by id % groups: their effects and what they do together."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(size, (rows,), generator=random) for size in SIZES], 1)
    effect = torch.tensor([-1.5, 1.5, -0.5, 0.5])[:groups]
    a, b = ids[:, 0] % groups, ids[:, 2] % groups
    dense = torch.randn(rows, 2, generator=random)
    logit = effect[a] + effect[b] + torch.where(a < 2, 0.7, -0.7) * torch.where(b % 2 == 0, 1.0, -1.0) + dense[:, 0]
    label = (torch.rand(rows, generator=random) < logit.sigmoid()).float()
    return dense, ids, label


def batches(rows=(), size=512):
    return list(zip(*(part.split(size) for part in rows), strict=True))


def test_alike_ids_are_near_and_others_far():
    found = warm_up(batches(planted()), SIZES, dim=4, learning_rate=0.1)
    for feature in (0, 2):
        vectors = found.embeddings[feature]
        assert vectors.shape == (SIZES[feature], 5)
        assert vectors.dtype == torch.float32
        group = torch.arange(SIZES[feature]) % 4
        middles = torch.stack([vectors[group == g].mean(0) for g in range(4)])
        within = (vectors - middles[group]).square().sum(1).mean()
        between = (middles - middles.mean(0)).square().sum(1).mean()
        assert between > 3 * within
    # The second feature says nothing, so that all its ids are alike: near each other, in the scale of all features.
    quiet, loud = (found.embeddings[feature].var(0).sum() for feature in (1, 0))
    assert quiet < 0.05 * loud


def test_counts_rows_and_loss():
    dense, ids, label = planted(5000)
    found = warm_up(batches((dense, ids, label)), SIZES)
    assert found.rows == 5000
    for feature, size in enumerate(SIZES):
        assert torch.equal(found.counts[feature], torch.bincount(ids[:, feature], minlength=size))
    longer = warm_up(batches(planted(40_000)), SIZES)
    base = -(label.mean() * label.mean().log() + (1 - label.mean()) * (1 - label.mean()).log())
    assert longer.loss < found.loss < 1.1 * base
    assert longer.loss < 0.92 * base


def test_an_id_without_an_access_has_the_mean_vector_of_the_accesses():
    dense, ids, label = planted(3000)
    ids[:, 2] = ids[:, 2] // 2
    found = warm_up(batches((dense, ids, label)), SIZES)
    vectors, counts = found.embeddings[2], found.counts[2]
    assert int((counts == 0).sum()) == 100
    mean = (vectors * counts[:, None]).sum(0) / counts.sum()
    assert torch.allclose(vectors[100:], mean.expand(100, -1), atol=1e-6)
    assert vectors[:100].std() > 0


def test_the_derivatives_are_those_of_autograd():
    torch.manual_seed(0)
    model = FactorizationMachine(2, SIZES, 3)
    dense, ids, _ = (part[:1] for part in planted(8))
    logits, by_rows = model(dense, ids)
    logits.sum().backward()
    gradient = model.table.weight.grad.to_dense()
    assert torch.allclose(gradient[ids[0] + model.starts], by_rows[0], atol=1e-6)


def test_distance_is_twice_the_rise_of_the_loss_when_an_id_gets_the_vector_of_another():
    """With labels drawn by the model itself, so that its gradient is zero on average and the second order remains."""
    torch.manual_seed(1)
    sizes = [30, 30, 30]
    model = FactorizationMachine(0, sizes, 3)
    with torch.no_grad():
        model.table.weight.normal_(0, 0.3)
    ids = torch.randint(30, (40_000, 3))
    logits, by_rows = model(torch.zeros(len(ids), 0), ids)
    p = logits.detach().sigmoid()
    curvature = torch.einsum("b,bi,bj->ij", p * (1 - p), by_rows[:, 0], by_rows[:, 0]) / len(ids)
    scaled = model.table.weight.detach()[:30] @ factor(curvature.double())
    shift = torch.roll(torch.arange(30), 1)
    swapped = ids.clone()
    swapped[:, 0] = shift[ids[:, 0]]
    q = model(torch.zeros(len(ids), 0), swapped)[0].detach().sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    distance = (scaled - scaled[shift]).square().sum(1).mean()
    assert float(distance) == pytest.approx(2 * float(divergence), rel=0.15)


def test_deterministic_by_seed_and_leaves_the_global_generator_alone():
    data = batches(planted(2000))
    state = torch.get_rng_state()
    a, b, c = (warm_up(data, SIZES, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    for one, same, other in zip(a.embeddings, b.embeddings, c.embeddings, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_no_numbers_and_integers_of_any_width():
    _, ids, label = planted(1000)
    found = warm_up([(torch.zeros(1000, 0), ids.int(), label)], SIZES)
    assert [len(part) for part in found.embeddings] == SIZES


def with_value(part, value):
    rows = [one.clone() for one in planted(100)]
    rows[part].view(-1)[7] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no examples"),
        (with_value(0, float("nan")), "batch 0: row 3 has a dense value that is NaN"),
        (with_value(1, 40), r"feature 'b' has the id 40, expected 0 to 5"),
        (with_value(1, -1), r"feature 'b' has the id -1"),
        (with_value(2, 1.5), r"a label is 1\.5"),
        (with_value(2, float("nan")), "a label is nan"),
        ([planted(10)[0], planted(10)[1][:, :2], planted(10)[2]], r"ids \(10, 2\).*expected \(B, D\), \(B, 3\)"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        warm_up([rows] if rows else [], SIZES, names=["a", "b", "c"])


def test_bad_sizes():
    with pytest.raises(ValueError, match="1 features"):
        warm_up([], [0])
