"""What block sampling costs."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset.log import open_log
from recpress.data.sampling.design_effect import design_effects


def test_sorted_columns_cost_and_shuffled_columns_do_not(tmp_path):
    users = np.repeat(np.arange(20), 100)
    mixed = np.random.default_rng(0).permutation(users)
    pq.write_table(pa.table({"user_id": users, "item_id": mixed}), tmp_path / "train.parquet", row_group_size=100)
    rows = open_log(tmp_path).train
    found = design_effects(rows, ["user_id", "item_id"])
    assert found["user_id"].effect == pytest.approx(100, rel=0.1)
    assert found["item_id"].effect == pytest.approx(1, abs=1)
    with pytest.raises(ValueError, match="at least two"):
        design_effects(rows, ["user_id"], [0])
