import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torchmetrics.functional import auroc
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from recpress.trainer.evaluate import metrics as rm


def test_count_ahead_counts_ties_against_the_model():
    target, others = tensor([2.0, 5.0]), tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert rm.count_ahead(target, others).tolist() == [2, 0]
    assert rm.count_ahead(target, others, mask=tensor([[True, False, True]] * 2)).tolist() == [1, 0]


def test_count_ahead_refuses_nan_but_not_where_masked():
    others = tensor([[1.0, 2.0], [math.nan, 0.0]])
    with pytest.raises(ValueError, match="row 1"):
        rm.count_ahead(tensor([0.0, 0.0]), others)
    assert rm.count_ahead(tensor([0.0, 0.0]), others, mask=others.isfinite()).tolist() == [2, 1]


def test_positions_of_several_heldout_items_differ():
    # User 0: scores 3, 5, 3 with 1, 0, 1 competitors ahead -> 5 is first, the two 3s are third and fourth.
    positions = rm.positions_in_ranking(tensor([3.0, 7.0, 5.0, 3.0]), tensor([1, 4, 0, 1]), rows=tensor([0, 1, 0, 0]))
    assert sorted(positions[[0, 3]].tolist()) == [3, 4]
    assert positions[2] == 1
    assert positions[1] == 5


def test_known_answers_of_one_item_a_user():
    positions, rows = tensor([1, 3, 11]), torch.arange(3)
    assert rm.hit_rate(positions, rows, 3, 10).tolist() == [1, 1, 0]
    assert rm.recall(positions, rows, 3, 10).tolist() == [1, 1, 0]
    assert rm.uncapped_recall(positions, rows, 3, 10).tolist() == [1, 1, 0]
    assert rm.ndcg(positions, rows, 3, 10).tolist() == [1, 0.5, 0]  # 1 / log2(3 + 1)
    assert rm.ndcg(positions, rows, 3, 2).tolist() == [1, 0, 0]
    assert rm.reciprocal_rank(positions, rows, 3).tolist() == pytest.approx([1, 1 / 3, 1 / 11])
    assert rm.ranking_auc(positions - 1, rows, tensor([10, 4, 10])).tolist() == pytest.approx([1, 0.5, 0])


def test_known_answers_of_several_items_a_user():
    # User 0 holds out three items at positions 1, 4 and 9; user 1 one at 2; user 2 none.
    positions, rows = tensor([4, 2, 1, 9]), tensor([0, 1, 0, 0])
    assert rm.hit_rate(positions, rows, 3, 2).tolist()[:2] == [1, 1]
    assert rm.recall(positions, rows, 3, 2).tolist()[:2] == [1 / 2, 1]  # one hit of min(2, 3)
    assert rm.uncapped_recall(positions, rows, 3, 2).tolist()[:2] == pytest.approx([1 / 3, 1])  # one hit of 3
    assert rm.recall(positions, rows, 3, 5).tolist()[:2] == pytest.approx([2 / 3, 1])
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert rm.ndcg(positions, rows, 3, 5).tolist()[:2] == pytest.approx(
        [(1 + 1 / math.log2(5)) / ideal, 1 / math.log2(3)]
    )
    assert rm.ndcg(positions, rows, 3, 2)[0].item() == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert rm.reciprocal_rank(positions, rows, 3).tolist()[:2] == [1, 0.5]
    # Ahead of user 0's items: 2, 0 and 6 of 8 competitors that are not held out.
    auc = rm.ranking_auc(tensor([2, 1, 0, 6]), rows, tensor([8, 4, 5]))
    assert auc.tolist()[:2] == pytest.approx([1 - 8 / 24, 3 / 4])
    for values in (rm.hit_rate(positions, rows, 3, 2), rm.reciprocal_rank(positions, rows, 3), auc):
        assert math.isnan(values[2])


@st.composite
def rankings(draw):
    users = draw(st.integers(1, 5))
    items = draw(st.integers(2, 12))
    scores = torch.stack([torch.tensor(draw(st.permutations(range(items)))) for _ in range(users)]).float()
    relevant = [
        draw(st.lists(st.integers(0, items - 1), min_size=1, max_size=items - 1, unique=True)) for _ in range(users)
    ]
    return scores, relevant


def ranked(scores, relevant):
    """Positions by this module of the relevant items of each user: flat positions, counts ahead, rows."""
    target_scores, ahead, rows = [], [], []
    for user, items in enumerate(relevant):
        counts = torch.ones(scores.shape[1], dtype=torch.bool)
        counts[items] = False
        own = scores[user, items]
        others = scores[user].expand(len(items), -1)
        target_scores.append(own)
        ahead.append(rm.count_ahead(own, others, counts.expand(len(items), -1)))
        rows += [user] * len(items)
    target_scores, ahead, rows = torch.cat(target_scores), torch.cat(ahead), torch.tensor(rows)
    return rm.positions_in_ranking(target_scores, ahead, rows), ahead, rows


@settings(deadline=None)
@given(rankings(), st.integers(1, 12))
def test_agrees_with_torchmetrics(ranking, k):
    scores, relevant = ranking
    users, items = scores.shape
    k = min(k, items)
    target = torch.zeros(users, items, dtype=torch.bool)
    for user, own in enumerate(relevant):
        target[user, own] = True
    indexes = torch.arange(users)[:, None].expand(users, items)
    positions, ahead, rows = ranked(scores, relevant)

    def theirs(metric):
        return metric(scores.flatten(), target.flatten(), indexes=indexes.flatten()).item()

    sizes = torch.tensor([len(own) for own in relevant])
    hit_rate = rm.hit_rate(positions, rows, users, k).mean().item()
    assert hit_rate == pytest.approx(theirs(RetrievalHitRate(top_k=k)))
    assert rm.ndcg(positions, rows, users, k).mean().item() == pytest.approx(
        theirs(RetrievalNormalizedDCG(top_k=k)), abs=1e-6
    )
    assert rm.reciprocal_rank(positions, rows, users).mean().item() == pytest.approx(theirs(RetrievalMRR()))
    found = rm.uncapped_recall(positions, rows, users, k)
    assert found.mean().item() == pytest.approx(theirs(RetrievalRecall(top_k=k)))
    torch.testing.assert_close(found * sizes, rm.recall(positions, rows, users, k) * sizes.clamp(max=k))
    auc = rm.ranking_auc(ahead, rows, items - sizes)
    each = [auroc(scores[u] / items, target[u].long(), task="binary").item() for u in range(users)]
    assert auc.tolist() == pytest.approx(each, abs=1e-6)


@settings(deadline=None)
@given(rankings(), st.randoms(use_true_random=False))
def test_the_order_in_which_items_are_given_does_not_matter(ranking, random):
    scores, relevant = ranking
    shuffled = [random.sample(own, len(own)) for own in relevant]
    users = len(relevant)
    for metric in (rm.hit_rate, rm.ndcg, rm.recall, rm.uncapped_recall):
        positions, _, rows = ranked(scores, relevant)
        others, _, other_rows = ranked(scores, shuffled)
        torch.testing.assert_close(metric(positions, rows, users, 3), metric(others, other_rows, users, 3))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_pointwise_auc_agrees_with_torchmetrics_under_ties(pairs):
    scores = torch.tensor([float(score) for score, _ in pairs])
    labels = torch.tensor([int(label) for _, label in pairs])
    if labels.min() == labels.max():
        with pytest.raises(ValueError, match="both labels"):
            rm.pointwise_auc(scores, labels)
    else:
        theirs = auroc(scores.sigmoid(), labels, task="binary").item()
        assert rm.pointwise_auc(scores, labels) == pytest.approx(theirs, abs=1e-6)


def test_pointwise_auc_known_answer():
    # Pairs (positive, negative): 3 > 1, 3 > 2, 2 > 1 won, 2 = 2 half.
    assert rm.pointwise_auc(tensor([3, 2, 1, 2]), tensor([1, 1, 0, 0])) == 3.5 / 4


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.0, math.nan], [0, 1], "row 1: the score"),
        ([0.0, 1.0], [0, 2], "row 1: label 2"),
        ([0.0, 1.0], [0.0, math.nan], "row 1: label nan"),
        ([0.0, 1.0, 2.0], [0, 1], "expected"),
    ],
)
def test_pointwise_auc_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        rm.pointwise_auc(tensor(scores), tensor(labels))
