"""Tables of held-out pairs with their negatives."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.negatives import table as module
from recpress.data.negatives.table import negatives_table


@pytest.mark.parametrize("limit", [2, 3, 8, 2**31 - 1])
def test_lists_beyond_the_offsets_of_one_array_become_chunks(tmp_path, monkeypatch, limit):
    """int32 offsets end at 2 ** 31 - 1; here they end early."""
    monkeypatch.setattr(module, "MAX_OFFSET", limit)
    negatives = np.arange(21).reshape(7, 3)
    table = negatives_table(np.arange(7), np.arange(7) + 50, negatives, pa.int32())
    assert table.schema.field("negatives").type == pa.list_(pa.int32())
    assert max(len(chunk.values) for chunk in table.column("negatives").chunks) <= max(limit, 3)
    pq.write_table(table, tmp_path / "negatives.parquet")
    read = pq.read_table(tmp_path / "negatives.parquet")
    assert read.column("negatives").to_pylist() == negatives.tolist()
    assert read.column("pos_item_id").to_pylist() == list(range(50, 57))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_no_rows_or_no_negatives(shape):
    table = negatives_table(np.arange(shape[0]), np.arange(shape[0]), np.zeros(shape, dtype=np.int64), pa.int64())
    assert table.column("negatives").to_pylist() == [[]] * shape[0]
