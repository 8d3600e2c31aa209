"""Columns of ids as a KeyedJaggedTensor."""

import torch

from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.stream.keyed_features import KeyedFeatures


def test_scalars_have_one_id_per_row_and_share_lengths_between_batches():
    build = KeyedFeatures()
    columns = {"user": torch.tensor([3, 1]), "item": torch.tensor([7, 8])}
    first, again = build(columns, 2), build(columns, 2)
    assert first.to_dict()["item"].values().tolist() == [7, 8]
    assert first.offsets().tolist() == [0, 1, 2, 3, 4]
    assert first.lengths().data_ptr() == again.lengths().data_ptr()


def test_lists_and_scalars_side_by_side():
    lists = JaggedColumn(torch.tensor([5, 6, 7]), torch.tensor([0, 3]))
    found = KeyedFeatures()({"user": torch.tensor([3, 1]), "history": lists}, 2).to_dict()
    assert found["user"].lengths().tolist() == [1, 1]
    assert found["history"].values().tolist() == [5, 6, 7]
    assert found["history"].lengths().tolist() == [0, 3]


def test_many_shapes_do_not_pile_up():
    build = KeyedFeatures()
    for size in range(1, 60):
        assert build({"user": torch.zeros(size, dtype=torch.int64)}, size).lengths().sum() == size
    assert len(build._shapes) <= 17
