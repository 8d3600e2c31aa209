"""Columns whose values are in the names of folders."""

from datetime import date

import pytest

from recpress.data.dataset.partitions import constants, is_partition, partition_root
from recpress.data.errors import InputError


def test_types_follow_from_all_values():
    paths = ["/log/day=2024-01-01/k=1/a.parquet", "/log/day=2024-01-02/k=07/b.parquet"]
    found = constants(paths, "/log")
    assert found[paths[0]]["day"].as_py() == date(2024, 1, 1)
    assert [found[path]["k"].as_py() for path in paths] == ["1", "07"]  # a leading zero makes all of them strings


def test_files_must_have_the_same_columns():
    with pytest.raises(InputError, match=r"/log/b.parquet: .* none, but 'k'"):
        constants(["/log/k=1/a.parquet", "/log/b.parquet"], "/log")


def test_names_of_folders():
    assert is_partition("k=1")
    assert not is_partition("train")
    assert partition_root("/log/day=1/k=2") == "/log"
