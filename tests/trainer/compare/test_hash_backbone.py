"""The backbone of `compare hash`: held-out examples, maps within a budget, ties."""

import pytest
import torch

from recpress.data.errors import InputError
from recpress.trainer.compare.hash_backbone import Backbone
from recpress.trainer.compare.hash_settings import search_axes, setting_of
from tests.trainer.compare.configs import hash_config


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    return Backbone(hash_config(folder / "out"), folder)


def test_without_validation_rows_a_tenth_of_train_is_held_out(backbone):
    assert backbone.log.val is None
    held_out = backbone.log.train.num_rows - len(backbone.train[0])
    assert held_out == pytest.approx(0.1 * backbone.log.train.num_rows, rel=0.1)
    assert backbone.val.num_cases <= backbone.config.choose_users
    assert float(backbone.counts[0].sum()) == float(backbone.counts[1].sum()) <= len(backbone.train[0])


def test_maps_have_the_rows_of_the_budget_or_fit_its_bytes(backbone):
    full, _ = backbone.factorize(0)
    axes = search_axes(backbone.config, "learned")
    setting = setting_of(backbone.config, "learned", {axis: values[0] for axis, values in axes.items()})
    maps, stats = backbone.make_maps(setting, full, backbone.budget)
    assert stats.rows == sum(m.num_rows for m in maps) == backbone.budget
    assert stats.serving_bytes == 4 * 900
    smaller = backbone.make_maps_within_bytes(setting, full, stats.nbytes)
    assert not isinstance(smaller, str)
    assert smaller[1].rows * backbone.row_bytes + smaller[1].nbytes <= backbone.budget * backbone.row_bytes
    assert "does not fit" in backbone.make_maps_within_bytes(setting, full, 10**9)


def test_ids_in_one_row_tie_and_are_ranked_at_random(backbone):
    users, items = torch.ones(backbone.log.num_users, 2), torch.ones(backbone.log.num_items, 2)
    items[0] = 2.0
    recall = backbone.test_metrics(users, items)[0]["Recall@10"]
    assert 0.0 < recall < 0.15  # by chance


@pytest.mark.parametrize("rows", [1, 901])
def test_an_impossible_budget_is_refused(rows, tmp_path):
    with pytest.raises(InputError, match=f"a budget of {rows}, expected 2 to 900"):
        Backbone(hash_config(tmp_path / "out", rows=rows), tmp_path)
