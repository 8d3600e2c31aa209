import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recpress.data.dataset.side_table import JaggedColumn, SideTable
from recpress.data.errors import InputError

TABLE = pa.table(
    {
        "genre": pa.array([3, 0, 1, 3], pa.int8()),
        "tags": pa.array([[5, 6], [], [7], [8, 9, 5]], pa.list_(pa.int32())),
        "price": pa.array([1.0, None, 3.0, 5.0]),
        "year": pa.array([1990, 2000, 1990, 2000]),
        "title": ["a", "b", "c", "d"],
    }
)


@given(st.lists(st.integers(0, 3), max_size=20))
def test_gather(ids):
    table = SideTable.from_arrow(TABLE)
    found, floats = table.gather(torch.tensor(ids, dtype=torch.int64))
    assert list(found) == ["genre", "tags", "year"]
    assert found["genre"].tolist() == [TABLE["genre"][k].as_py() for k in ids]
    tags = found["tags"]
    assert isinstance(tags, JaggedColumn)
    assert [part.tolist() for part in tags.values.split(tags.lengths.tolist())][: len(ids)] == [
        TABLE["tags"][k].as_py() for k in ids
    ]
    assert floats.shape == (len(ids), 1)


def test_floats_are_standardised_and_missing_ones_are_the_mean():
    table = SideTable.from_arrow(TABLE, categorical=["genre"], floats=["price", "year"])
    assert table.float_names == ["price", "year"]
    scale = np.sqrt(8 / 3)
    expected = torch.tensor([[-2 / scale, -1], [0, 1], [0, -1], [2 / scale, 1]], dtype=torch.float32)
    torch.testing.assert_close(table.floats, expected)
    constant = SideTable.from_arrow(pa.table({"x": [2.0, 2.0], "y": pa.array([None, None], pa.float32())}))
    assert torch.equal(constant.floats, torch.zeros(2, 2))


def test_number_of_values():
    assert SideTable.from_arrow(TABLE, categorical=["genre", "tags"]).num_values() == {"genre": 4, "tags": 10}


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (TABLE, ["colour"], "items.parquet: no column 'colour'"),
        (TABLE, ["title"], "items.parquet, column 'title': type string"),
        (pa.table({"a": [1, None, 2]}), None, "items.parquet, column 'a', row 1: null"),
        (pa.table({"a": [1, 2, -2]}), None, "items.parquet, column 'a', row 2: id -2"),
    ],
)
def test_bad_tables_are_named(table, columns, message):
    with pytest.raises(InputError, match=message):
        SideTable.from_arrow(table, categorical=columns, where="items.parquet")


def test_ids_that_are_no_numbers_from_0_are_refused():
    """Such as hashes: a table with a row for each number up to them would fill the memory."""
    for ids in (pa.array([1, 10**12]), pa.array([[1], [10**12]])):
        with pytest.raises(InputError, match=r"items.parquet, column 'g': id 1000000000000 in 2 values.*from 0"):
            SideTable.from_arrow(pa.table({"g": ids}), where="items.parquet")
