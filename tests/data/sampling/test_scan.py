"""Full passes over a log."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import open_log
from recpress.data.sampling.scan import iter_columns


def test_ranks_share_the_row_groups_and_a_sample_has_a_complement(tmp_path):
    pq.write_table(
        pa.table({"user_id": np.arange(100), "item_id": np.arange(100)}), tmp_path / "train.parquet", row_group_size=7
    )
    rows = open_log(tmp_path).train

    def users(**given):
        return [user for data in iter_columns(rows, ["user_id"], **given) for user in data["user_id"].tolist()]

    assert users() == list(range(100))
    assert sorted(users(rank=0, world=2) + users(rank=1, world=2)) == list(range(100))
    sample = SampleConfig(rate=0.3)
    inside, outside = users(sample=sample), users(sample=sample, complement=True)
    assert sorted(inside + outside) == list(range(100))
    assert 10 < len(inside) < 50
