"""One split of a log: its row groups and their columns."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.log import open_log
from recpress.data.dataset.parquet_split import iter_row_groups
from recpress.data.errors import InputError


@pytest.fixture
def rows(tmp_path):
    table = pa.table({"user_id": np.arange(10), "item_id": np.arange(10) % 3})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=4)
    return open_log(tmp_path).train


def test_row_groups_in_any_order(rows):
    assert rows.num_rows == 10
    found = {place: data["user_id"].tolist() for place, data in iter_row_groups(rows, ["user_id"], [2, 0])}
    assert found == {2: [8, 9], 0: [0, 1, 2, 3]}


def test_errors_name_file_and_row_group(rows, tmp_path):
    path = tmp_path / "train.parquet"
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"train\.parquet, row group 0"):
        rows.read(rows.groups[0], ["user_id"])
