"""Transforms of numbers: known answers, missing values, buckets."""

import numpy as np
import pytest
import torch

from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.trainer.features.batches import _last
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.features.numbers import Numbers

COLUMN = np.array([-3.0, 0.0, 1.0, np.nan, 7.0, np.inf])


def test_a_number_is_standardized_after_its_logarithm():
    found = Numbers.fit(FeatureConfig(kind="float"), COLUMN).values(torch.from_numpy(COLUMN))
    known = np.sign(COLUMN[[0, 1, 2, 4]]) * np.log1p(np.abs(COLUMN[[0, 1, 2, 4]]))
    expected = (known - known.mean()) / known.std()
    np.testing.assert_allclose(found[[0, 1, 2, 4]].numpy(), expected, rtol=1e-6)
    assert found[[3, 5]].tolist() == [0, 0]


def test_a_missing_number_gets_its_value_before_the_transform():
    numbers = Numbers.fit(FeatureConfig(kind="float", transform=("log1p",), missing=1.0), COLUMN)
    assert numbers.values(torch.tensor([np.nan, 1.0])).tolist() == pytest.approx([np.log(2)] * 2)
    assert Numbers.fit(FeatureConfig(kind="float", transform=()), COLUMN).values(torch.tensor([7.0])).tolist() == [7]


def test_constant_and_empty_columns_are_finite():
    for column in (np.ones(5), np.full(3, np.nan)):
        numbers = Numbers.fit(FeatureConfig(kind="float"), column)
        assert torch.isfinite(numbers.values(torch.tensor([1.0, np.nan]))).all()
        assert Numbers.fit(FeatureConfig(kind="bucketized"), column).num_buckets >= 2


@pytest.mark.parametrize("transform", [("standardize",), ("log1p", "standardize")])
def test_rounding_is_no_deviation(transform):
    column = np.full(100, 0.1)
    assert column.std() > 0  # the mean is rounded
    numbers = Numbers.fit(FeatureConfig(kind="float", transform=transform), column)
    assert numbers.transform.std == 1
    assert abs(float(numbers.values(torch.tensor([0.2])))) < 0.2


def test_buckets_have_as_many_rows_each_and_one_for_missing_numbers():
    column = np.arange(1000.0)
    numbers = Numbers.fit(FeatureConfig(kind="bucketized", buckets=4), column)
    found = numbers.buckets(torch.tensor([*column, np.nan]))
    assert torch.bincount(found).tolist() == [1, 250, 250, 250, 250]
    assert numbers.num_buckets == 5
    given = Numbers.fit(FeatureConfig(kind="bucketized", boundaries=(0.0, 10.0)), column)
    assert given.buckets(torch.tensor([-1.0, 0.0, 10.0, np.nan])).tolist() == [1, 2, 3, 0]


def test_a_sequence_has_its_last_ids():
    lists = JaggedColumn(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([3, 0, 1, 2]))
    last = _last(lists, 2)
    assert last.values.tolist() == [2, 3, 4, 5, 6]
    assert last.lengths.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FeatureConfig(kind="sequence"), "max_length is 0, expected at least 1"),
        (FeatureConfig(kind="list", max_length=3), "max_length: expected kind"),
        (FeatureConfig(kind="float", dimension=8), "dimension: a float has no table"),
        (FeatureConfig(kind="id", transform=("log1p",)), "transform: expected kind"),
        (FeatureConfig(kind="bucketized", boundaries=(2.0, 1.0)), "ascending"),
        (FeatureConfig(kind="bucketized", frozen="f"), "neither frozen rows nor a hash"),
        (FeatureConfig(kind="id", storage="int8"), "only frozen rows"),
        (FeatureConfig(kind="id", hash=FeatureHash(rows=0)), r"hash\.rows is 0"),
        (FeatureConfig(kind="id", hash=FeatureHash(rows=9, method="double", rows_per_id=1)), "double has 2"),
    ],
)
def test_settings_that_do_not_fit_each_other(config, message):
    with pytest.raises(InputError, match=message) as raised:
        config.check("x")
    assert str(raised.value).startswith("features.x")
