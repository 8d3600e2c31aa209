"""LightGCN: propagation and gradients against a dense reference, BPR by known answers, training that resumes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.compare.config import LightGCNConfig
from recpress.trainer.compare.light_gcn import LightGCN, LightGCNTraining, Propagation, bpr_loss

USERS, ITEMS = 7, 5
CONFIG = LightGCNConfig(dim=4, batch_size=8, learning_rate=0.01, evaluate_every=1, patience=3, epochs=6)


def pairs(rows=20):
    """Without examples of user 6 and of item 4; some pairs occur twice."""
    rng = np.random.default_rng(0)
    return rng.integers(0, USERS - 1, rows), rng.integers(0, ITEMS - 1, rows)


def dense(layers):
    """Mean of the powers 0 to `layers` of D^-1/2 B D^-1/2."""
    b = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    for u, i in zip(*pairs(), strict=True):
        b[u, USERS + i] = b[USERS + i, u] = 1
    scale = b.sum(1).clamp_min(1).rsqrt()
    a = scale[:, None] * b * scale
    return sum(torch.linalg.matrix_power(a, k) for k in range(layers + 1)) / (layers + 1)


def maps():
    users = torch.tensor([[0, 1], [0, 0], [1, 2], [2, 2], [1, 0], [0, 2], [1, 1]], dtype=torch.int32)
    items = torch.tensor([[0], [1], [0], [1], [1]], dtype=torch.int32)
    weights = torch.tensor([[0.5], [2.0], [1.0], [-1.0], [1.0]])
    return IdMap(rows=users, num_rows=3, method="co-cluster"), IdMap(rows=items, num_rows=2, weights=weights)


def model(with_maps=True, **more):
    return LightGCN(pairs(), USERS, ITEMS, maps() if with_maps else None, replace(CONFIG, **more), seed=1)


def matrix():
    """(ids, rows) of `maps`: the mean of two rows of a co-cluster map, the weighted sum of others."""
    a = torch.zeros(USERS + ITEMS, 5, dtype=torch.float64)
    for user, rows in enumerate(maps()[0].rows.tolist()):
        for row in rows:
            a[user, row] += 0.5
    for item, (row, weight) in enumerate(zip([0, 1, 0, 1, 1], [0.5, 2, 1, -1, 1], strict=True)):
        a[USERS + item, 3 + row] = weight
    return a


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_propagation_is_the_mean_of_the_powers_of_the_normalized_graph(layers):
    vectors = torch.randn(USERS + ITEMS, 4, generator=torch.Generator().manual_seed(0))
    found = Propagation(pairs(), USERS, ITEMS, layers)(vectors)
    assert torch.allclose(found.double(), dense(layers) @ vectors.double(), atol=1e-6)


def test_vectors_and_gradients_are_those_of_dense_matrices():
    made = model()
    linear = dense(2) @ matrix()
    assert torch.allclose(made.vectors().double(), linear @ torch.cat(made.rows).double(), atol=1e-6)
    goal = torch.randn(USERS + ITEMS, 4, generator=torch.Generator().manual_seed(3))
    (made.vectors() * goal).sum().backward()
    assert torch.allclose(torch.cat([rows.grad for rows in made.rows]).double(), linear.T @ goal.double(), atol=1e-6)


def test_without_maps_each_id_has_a_row():
    made = model(with_maps=False)
    assert [tuple(rows.shape) for rows in made.rows] == [(USERS, 4), (ITEMS, 4)]
    assert torch.allclose(made.vectors().double(), dense(2) @ torch.cat(made.rows).double(), atol=1e-6)
    made.vectors().sum().backward()
    column_sums = dense(2).sum(0).float()
    assert torch.allclose(torch.cat([rows.grad[:, 0] for rows in made.rows]), column_sums, atol=1e-6)


def test_rows_start_at_the_given_spread():
    big = LightGCN(pairs(), USERS, ITEMS, None, replace(CONFIG, dim=2000, init_std=0.25), seed=0)
    assert float(torch.cat(big.rows).std()) == pytest.approx(0.25, rel=0.02)


def test_bpr_is_the_mean_of_minus_log_sigmoid_of_the_score_difference():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, -1.0]])
    loss = bpr_loss(vectors, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([3, 2]))
    # user 0: 3 - 1; user 1: -2 - 2
    expected = -(math.log(1 / (1 + math.exp(-2))) + math.log(1 / (1 + math.exp(4)))) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(bpr_loss(1e3 * vectors, torch.tensor([1]), torch.tensor([3]), torch.tensor([2]))) == pytest.approx(4e6)


def own_items(vectors):
    """The share of train pairs above a random pair: rises as the model learns."""
    users, items = (torch.from_numpy(ids) for ids in pairs())
    scores = vectors[:USERS] @ vectors[USERS:].T
    return float((scores[users, items] > scores.mean()).float().mean())


def test_training_lowers_the_loss_and_keeps_the_best_vectors():
    seen = []
    fitted = LightGCNTraining(model(epochs=40, patience=40), own_items, on_evaluation=seen.append).run()
    assert seen[-1].loss < 0.75 * seen[0].loss
    best = max(seen, key=lambda found: found.value)
    assert (fitted.value, fitted.epoch) == (best.value, best.epoch)
    assert own_items(fitted.vectors) == best.value


def test_training_stops_after_evaluations_without_improvement():
    values = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.9])
    seen = []
    fitted = LightGCNTraining(model(), lambda _: next(values), on_evaluation=seen.append).run()
    assert [found.epoch for found in seen] == [1, 2, 3, 4, 5]
    assert [found.least_epochs for found in seen] == [3, 3, 2, 1, 0]
    assert (fitted.epoch, fitted.value) == (2, 0.3)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_training_ends_with_the_same_rows(after, tmp_path):
    straight = LightGCNTraining(model(), own_items).run()
    path = tmp_path / "run" / "state.npz"

    def stop(found):
        if found.epoch == after + 1:
            raise Stop

    with pytest.raises(Stop):
        LightGCNTraining(model(), own_items, path, stop).run()
    seen = []
    resumed = LightGCNTraining(model(), own_items, path, seen.append).run()
    assert seen[0].epoch == after + 1
    assert (resumed.vectors == straight.vectors).all()
    assert (resumed.epoch, resumed.value) == (straight.epoch, straight.value)
    assert [file.name for file in path.parent.iterdir()] == ["state.npz"]
    again = LightGCNTraining(model(), own_items, path, lambda _: pytest.fail("trained again")).run()
    assert (again.vectors == straight.vectors).all()


def test_a_run_with_more_epochs_goes_on_from_the_end_of_the_shorter_one(tmp_path):
    path, seen = tmp_path / "state.npz", []
    LightGCNTraining(model(epochs=3, patience=9), own_items, path).run()
    longer = LightGCNTraining(model(epochs=6, patience=9), own_items, path, seen.append).run()
    assert [found.epoch for found in seen] == [4, 5, 6]
    straight = LightGCNTraining(model(epochs=6, patience=9), own_items).run()
    assert (longer.vectors == straight.vectors).all()


def test_a_damaged_checkpoint_or_one_of_another_size_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    LightGCNTraining(model(), own_items, path).run()
    with pytest.raises(InputError, match=r"rows \(3, 4\), expected \(7, 4\)"):
        LightGCNTraining(model(with_maps=False), own_items, path).run()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"state\.npz: incomplete or corrupt checkpoint"):
        LightGCNTraining(model(), own_items, path).run()


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(InputError, match="the loss of epoch 1 is"):
        LightGCNTraining(model(init_std=1e30), own_items).run()


@pytest.mark.parametrize(
    "more", [{"dim": 0}, {"epochs": 0}, {"patience": 0}, {"learning_rate": 0.0}, {"init_std": math.nan}, {"layers": -1}]
)
def test_settings_out_of_range_are_refused(more):
    with pytest.raises(InputError, match=f"lightgcn.{next(iter(more))}"):
        replace(CONFIG, **more)
