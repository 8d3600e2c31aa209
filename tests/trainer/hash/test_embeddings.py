"""Embeddings from files: each kind gives the same matrix, and what is none is one clear error."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed import checkpoint

from recpress.data.errors import InputError
from recpress.trainer.hash.embeddings import read_embedding

TABLE = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def test_every_kind_of_file_gives_the_same_matrix(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TABLE)
    pq.write_table(pa.table({"vector": list(TABLE)}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({f"d{k}": TABLE[:, k] for k in range(3)}), tmp_path / "columns.parquet")
    torch.save({"net.table": torch.from_numpy(TABLE), "other": torch.zeros(2)}, tmp_path / "c.pt")
    torch.save({"model": {"net.table": torch.from_numpy(TABLE)}}, tmp_path / "d.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"net.table": torch.from_numpy(TABLE)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    files = ("a.npy", "lists.parquet", "columns.parquet", "c.pt:net.table", "d.pt:model.net.table", "dcp:net.table")
    for name in files:
        found = read_embedding(f"{tmp_path}/{name}")
        assert found.shape == (7, 3)
        assert np.array_equal(np.asarray(found[0:7]), TABLE), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npy", "cannot be read"),
        ("missing.pt:key", "no such file"),
        ("ids.npy", r"holds int64 \(7, 1\), expected a matrix of floats"),
        ("objects.npy", "cannot be read"),
        ("uneven.parquet", "column 'vector', row [01]: a list of .*same length"),
        ("text.parquet", "column 'name' is string"),
        ("c.pt:absent", "no tensor 'absent'; it has table"),
        ("code.pt:key", "not a file of tensors"),
        ("table.csv", r"expected FILE\.npy"),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, name: str, message: str) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((7, 1), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    pq.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), tmp_path / "uneven.parquet")
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "text.parquet")
    torch.save({"table": torch.zeros(2, 2)}, tmp_path / "c.pt")
    torch.save(Path, tmp_path / "code.pt")
    with pytest.raises(InputError, match=message) as error:
        read_embedding(f"{tmp_path}/{name}")
    assert name.split(":")[0] in str(error.value)
    assert "\n" not in str(error.value)
