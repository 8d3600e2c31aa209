import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import NegativesConfig, SampleConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import (
    InBatchNegatives,
    InteractionSet,
    PopularityNegatives,
    UniformNegatives,
    alias_table,
    make_negatives,
)
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda, without_waiting

COUNTS = np.array([5, 0, 1, 100, 20, 0])


def chi_square(items: torch.Tensor, probability: np.ndarray) -> float:
    """Standardised chi square of draws against a distribution."""
    found = np.bincount(items.flatten().numpy(), minlength=len(probability))
    assert not found[probability == 0].any()
    likely = probability > 0
    expected = probability[likely] * items.numel()
    freedom = likely.sum() - 1
    return (((found[likely] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distributions(seed):
    users = torch.zeros(20_000, dtype=torch.int64)
    assert abs(chi_square(UniformNegatives(37, 8, seed).draw(users, 0, 0), np.full(37, 1 / 37))) < 5
    for power in (0.0, 0.75, 1.0):
        weights = np.where(COUNTS > 0, COUNTS**power, 0)
        negatives = PopularityNegatives(COUNTS, 8, power, seed)
        assert abs(chi_square(negatives.draw(users, 0, 0), weights / weights.sum())) < 5
        seen = torch.tensor([0, 2, 3, 4])
        np.testing.assert_allclose(negatives.log_q(seen).exp().numpy(), (weights / weights.sum())[seen], rtol=1e-6)
        assert torch.isfinite(negatives.log_q(torch.arange(6))).all()


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 5).map(float)), min_size=1, max_size=40))
def test_alias_table_has_the_weights(weights):
    """What an item gets from its own column and as others' alias is its share; none where it has none."""
    weights = np.array(weights)
    if not weights.any():
        return
    prob, alias = alias_table(weights)
    assert ((prob >= 0) & (prob <= 1)).all()
    got = prob.astype(np.float64)
    np.add.at(got, alias, 1 - prob.astype(np.float64))
    np.testing.assert_allclose(got / len(weights), weights / weights.sum(), rtol=1e-4, atol=2e-7)
    assert not got[weights == 0].any()


def test_alias_table_of_a_power_law():
    weights = np.arange(1, 100_001) ** -1.0
    weights[::3] = 0
    prob, alias = alias_table(weights)
    got = prob.astype(np.float64)
    np.add.at(got, alias, 1 - prob.astype(np.float64))
    np.testing.assert_allclose(got / len(weights), weights / weights.sum(), rtol=1e-4, atol=1e-11)
    assert not got[::3].any()


def test_slots_rows_epochs_and_seeds_are_independent():
    users = torch.zeros(30_000, dtype=torch.int64)
    one = UniformNegatives(1000, 3, 0).draw(users, 0, 0)
    others = {
        "slot": one[:, 1],
        "row": one[1:, 0],
        "epoch": UniformNegatives(1000, 3, 0).draw(users, 1, 0)[:, 0],
        "seed": UniformNegatives(1000, 3, 1).draw(users, 0, 0)[:, 0],
    }
    for name, other in others.items():
        pair = torch.stack([one[: len(other), 0], other]).double()
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(len(other)), name
        assert (pair[0] == pair[1]).double().mean() < 0.003, name


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(1, 7), st.integers(0, 5), st.booleans())
@settings(max_examples=50, deadline=None)
def test_draws_depend_on_the_place_alone(position, rows, count, epoch, reject):
    """A batch that is split in any way (over ranks, or by a resume) has the same negatives."""
    users = torch.arange(rows) % 5
    pairs = InteractionSet.of_pairs(np.array([0, 0, 1, 3]), np.array([1, 2, 3, 4]), 9) if reject else None
    negatives = PopularityNegatives(np.arange(1, 10), count, seed=7, reject=pairs)
    whole = negatives.draw(users, epoch, position)
    assert whole.shape == (rows, count)
    for cut in (0, 1, rows // 2, rows):
        parts = [
            PopularityNegatives(np.arange(1, 10), count, seed=7, reject=pairs).draw(part, epoch, start)
            for part, start in ((users[:cut], position), (users[cut:], position + cut))
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("redrawn", [1 << 21, 30_000])
def test_draws_are_the_same_on_a_gpu(device, monkeypatch, redrawn):
    users = torch.arange(5000) % 90
    rng = np.random.default_rng(0)
    full = np.full(100, 7), np.arange(100)
    owner, owned = (
        np.concatenate(p) for p in ((rng.integers(0, 90, 4000), full[0]), (rng.integers(0, 100, 4000), full[1]))
    )
    pairs = InteractionSet.of_pairs(owner, owned, 100)
    monkeypatch.setattr("recpress.data.negatives.samplers.AT_ONCE", redrawn)
    for make in (
        lambda: UniformNegatives(100, 4, 3, pairs),
        lambda: PopularityNegatives(np.arange(100), 4, 0.75, 3, pairs),
    ):
        host, other = make(), make()
        for epoch in (1, 2):
            monkeypatch.setattr("recpress.data.negatives.samplers.on_host", lambda users: True)
            want = host.draw(users, epoch, 10)
            monkeypatch.setattr("recpress.data.negatives.samplers.on_host", lambda users: False)
            assert torch.equal(want, other.draw(users.to(device), epoch, 10).cpu())
        items = torch.arange(100)
        assert torch.equal(host.log_q(items), other.log_q(items.to(device)).cpu())
        assert host.kept_positives == other.kept_positives > 0


def test_shared_negatives_are_the_same_on_a_gpu(device, monkeypatch):
    rng = np.random.default_rng(0)
    pairs = InteractionSet.of_pairs(rng.integers(0, 90, 4000), rng.integers(0, 100, 4000), 100)
    users = torch.from_numpy(rng.integers(0, 95, 50))
    want = UniformNegatives(100, 40, 3, pairs).draw_shared(users, 1, 10)
    monkeypatch.setattr("recpress.data.negatives.interaction_set.on_host", lambda users: False)
    monkeypatch.setattr("recpress.data.negatives.interaction_set.AT_ONCE", 7 * 40)
    found = UniformNegatives(100, 40, 3, pairs).draw_shared(users.to(device), 1, 10)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(want, found, strict=True))
    assert 0 < int(want[1].sum()) < want[1].numel()


@pytest.mark.parametrize("shared", [False, True])
def test_on_cuda_no_draw_waits(shared):
    pairs = InteractionSet.of_pairs(np.arange(50) % 9, np.arange(50), 100)
    with fake_cuda():
        on_device = InteractionSet(torch.empty(len(pairs), dtype=torch.int64, device=CUDA), 100)
        uniform = UniformNegatives(100, 4, reject=on_device)
        users = cuda_ids(8)
        if shared:
            items, excluded = without_waiting(lambda: uniform.draw_shared(users, 0, 16))
            assert (items.shape, excluded.shape) == ((4,), (8, 4))
        else:
            items = without_waiting(lambda: uniform.draw(users, 0, 16))
            assert items.shape == (8, 4)
        assert items.device == CUDA


def test_own_positives_are_rejected():
    rng = np.random.default_rng(1)
    owner, owned = rng.integers(0, 50, 2000), rng.integers(0, 200, 2000)
    pairs = InteractionSet.of_pairs(owner, owned, 200)
    have = set(zip(owner.tolist(), owned.tolist(), strict=True))
    assert len(pairs) == len(have)
    users = torch.arange(4000) % 60
    plain = UniformNegatives(200, 5).draw(users, 0, 0)
    negatives = UniformNegatives(200, 5, reject=pairs)
    drawn = negatives.draw(users, 0, 0)
    assert any((u, i) in have for u, row in zip(users.tolist(), plain.tolist(), strict=True) for i in row)
    assert not any((u, i) in have for u, row in zip(users.tolist(), drawn.tolist(), strict=True) for i in row)
    assert negatives.kept_positives == 0
    clear = ~pairs.contains(users.unsqueeze(1), plain)
    assert torch.equal(drawn[clear], plain[clear])  # what was no positive is not drawn again


def test_what_is_left_is_uniform_over_the_other_items():
    pairs = InteractionSet.of_pairs(np.zeros(5, np.int64), np.arange(5), 12)
    drawn = UniformNegatives(12, 4, reject=pairs).draw(torch.zeros(20_000, dtype=torch.int64), 0, 0)
    assert abs(chi_square(drawn, np.array([0.0] * 5 + [1 / 7] * 7))) < 5


def test_a_user_with_every_item_keeps_positives_and_they_are_counted():
    pairs = InteractionSet.of_pairs(np.zeros(4, np.int64), np.arange(4), 4)
    negatives = UniformNegatives(4, 3, reject=pairs)
    drawn = negatives.draw(torch.tensor([0, 1, 0]), 0, 0)
    assert drawn.shape == (3, 3)
    assert ((drawn >= 0) & (drawn < 4)).all()
    assert negatives.kept_positives == 6
    negatives.draw(torch.tensor([0]), 0, 3)
    assert negatives.kept_positives == 9


def test_pairs_of_a_log(tmp_path):

    table = pa.table({"user_id": [3, 0, 3, 3], "item_id": [1, 2, 1, 0]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    log = open_log(tmp_path)
    pairs = InteractionSet.of([log.train], "user_id", "item_id", log.num_items)
    assert pairs.keys.tolist() == [2, 9, 10]
    assert pairs.contains(torch.tensor([0, 3, 2, 9**9]), torch.tensor([2, 2, 1, 1])).tolist() == [
        True,
        False,
        False,
        False,
    ]
    empty = InteractionSet.of([], "user_id", "item_id", 3)
    assert not empty.contains(torch.tensor([0]), torch.tensor([0])).any()


@given(st.integers(0, 400), st.integers(1, 40), st.integers(0, 99))
def test_pairs_are_found_exactly(size, items, seed):
    rng = np.random.default_rng(seed)
    users, owned = rng.integers(0, 30, size), rng.integers(0, items, size)
    pairs = InteractionSet.of_pairs(users, owned, items)
    expected = torch.zeros(40, items, dtype=torch.bool)
    expected[users, owned] = True
    assert torch.equal(pairs.contains(torch.arange(40).unsqueeze(1), torch.arange(items)), expected)


@given(
    st.integers(0, 60), st.integers(1, 400), st.integers(0, 40), st.sampled_from([1, 65_536, 10**9]), st.integers(0, 99)
)
def test_among_finds_exactly_the_items_of_each_user(size, items, count, stride, seed):
    """Items far apart, and of one filter slot (65,536 apart), are told from each other."""
    rng = np.random.default_rng(seed)
    users, owned = rng.integers(0, 5, size), rng.integers(0, items, size) * stride
    pairs = InteractionSet.of_pairs(users, owned, items * stride)
    asked, drawn = torch.from_numpy(rng.integers(0, 6, 7)), torch.from_numpy(rng.integers(0, items, count) * stride)
    known = set(zip(users.tolist(), owned.tolist(), strict=True))
    expected = [[(user, item) in known for item in drawn.tolist()] for user in asked.tolist()]
    assert pairs.among(asked, drawn).tolist() == expected


def test_among_takes_no_memory_of_the_size_of_the_catalog():
    items = 2**40  # 4 TiB of int32
    pairs = InteractionSet.of_pairs(np.array([0, 1]), np.array([7, items - 1]), items)
    found = pairs.among(torch.tensor([0, 1, 2]), torch.tensor([items - 1, 7]))
    assert found.tolist() == [[False, True], [True, False], [False, False]]


def test_positives_are_rejected_by_default_where_a_log_is_dense_and_read_as_a_whole():
    dense = {"rows": 1_000_000, "users": 6000, "items": 3700}
    tenth, blocks = SampleConfig(rate=0.1), SampleConfig(rate=0.1, kind="block")
    auto, yes, no = (NegativesConfig(reject_positives=kind) for kind in ("auto", "yes", "no"))
    assert auto.rejects(**dense, sample=tenth)
    assert not auto.rejects(**dense, sample=blocks)  # of which the other row groups are not read
    assert auto.rejects(**dense, sample=SampleConfig(rate=1.0, kind="block"))
    assert not auto.rejects(**dense | {"items": 37_000}, sample=tenth)  # sparse
    assert not auto.rejects(**{name: 10 * size for name, size in dense.items()}, sample=tenth)  # sparse
    assert not auto.rejects(rows=10**8, users=10**5, items=10**4, sample=tenth)  # too large
    assert not NegativesConfig(kind="in-batch").rejects(**dense, sample=tenth)
    assert yes.rejects(rows=10**9, users=10**8, items=10**7, sample=blocks)
    assert not no.rejects(**dense, sample=tenth)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="63 bits"):
        InteractionSet.of_pairs(np.array([2**40]), np.array([0]), 2**30)


def test_an_item_beyond_the_counts_is_as_likely_as_one_with_a_count_of_1():
    negatives = PopularityNegatives(np.array([4, 1, 0, 9]), count=2, power=0.5)
    torch.testing.assert_close(negatives.log_q(torch.tensor([0, 4, 70])).exp(), torch.tensor([2.0, 1.0, 1.0]) / 6)


def test_log_q_of_in_batch_items_is_their_share_of_the_rows():
    counts = np.bincount([7, 7, 8, 9, 9, 9, 9, 9], minlength=10)
    log_q = InBatchNegatives(counts).log_q(torch.tensor([7, 8, 7, 9]))
    torch.testing.assert_close(log_q.exp(), torch.tensor([0.25, 0.125, 0.25, 0.625]))


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in-batch"])
def test_made_from_a_configuration(kind):
    negatives = make_negatives(NegativesConfig(kind=kind, count=3, seed=5), 6, COUNTS)
    drawn = negatives.draw(torch.arange(10), 0, 0)
    assert drawn.shape == (10, 0 if kind == "in-batch" else 3)
    assert drawn.dtype == torch.int64
    log_q = negatives.log_q(torch.tensor([[0, 3]]))
    assert log_q.shape == (1, 2)
    assert log_q.dtype == torch.float32


def test_bad_configuration_is_refused():
    with pytest.raises(InputError, match="count is 0"):
        make_negatives(NegativesConfig(count=0), 6)
    with pytest.raises(InputError, match="power"):
        make_negatives(NegativesConfig(kind="popularity", power=float("nan")), 6, COUNTS)
    with pytest.raises(InputError, match="counts"):
        make_negatives(NegativesConfig(kind="popularity"), 6, np.zeros(6))
    with pytest.raises(InputError, match="0 items"):
        make_negatives(NegativesConfig(), 0)
