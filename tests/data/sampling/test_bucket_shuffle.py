"""A shuffle of tables that do not fit in memory."""

import numpy as np
import pyarrow as pa

from recpress.data.sampling.bucket_shuffle import BucketShuffle


def shuffled(folder, seed):
    shuffle = BucketShuffle(folder, 1000, 100, seed)
    for first in range(0, 1000, 50):
        shuffle.add(pa.table({"row": np.arange(first, first + 50)}))
    rows = [table["row"].to_numpy() for table in shuffle.tables()]
    assert not list(folder.iterdir())
    return np.concatenate(rows)


def test_every_row_once_in_an_order_that_the_seed_gives(tmp_path):
    first = shuffled(tmp_path / "a", 1)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.2
    assert np.array_equal(shuffled(tmp_path / "b", 1), first)
    assert not np.array_equal(shuffled(tmp_path / "c", 2), first)


def test_without_rows_there_are_no_tables(tmp_path):
    assert list(BucketShuffle(tmp_path / "none", 10, 10, 0).tables()) == []
