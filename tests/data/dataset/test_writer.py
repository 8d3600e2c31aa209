"""Files and row groups of the given size."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import LayoutConfig
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError


def test_rows_are_cut_into_row_groups_and_files(tmp_path):
    with LogWriter(tmp_path, LayoutConfig(rows_per_file=10, row_group_rows=4)) as writer:
        for first in range(0, 23, 3):
            writer.part("train").write(pa.table({"user_id": list(range(first, min(first + 3, 23)))}))
        assert writer.close() == {"train": 23}
    files = sorted((tmp_path / "train").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [10, 10, 3]
    footer = pq.read_metadata(files[0])
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [4, 4, 2]
    assert pa.concat_tables(map(pq.read_table, files))["user_id"].to_pylist() == list(range(23))


def test_a_layout_without_rows_is_invalid(tmp_path):
    with pytest.raises(InputError, match="at least 1 row"):
        LogWriter(tmp_path, LayoutConfig(row_group_rows=0))
