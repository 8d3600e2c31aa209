"""Id maps on disk, and the ids that they are for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recpress.data.dataset import artifact
from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.id_maps import HASH, ROW_VECTORS, load_maps, open_maps, save_maps

MAP = IdMap(rows=torch.tensor([[0], [1], [0], [2]], dtype=torch.int32), num_rows=3)


def log(ids=4):
    return SimpleNamespace(path="log", num_ids=lambda side: ids, vocabulary_fingerprint=lambda side: None)


def test_maps_are_loaded_as_they_were_saved(tmp_path):
    save_maps({"user": MAP}, tmp_path)
    found = load_maps(tmp_path, ["user"], log())["user"]
    assert (found.num_ids, found.num_rows) == (4, 3)


def test_a_map_for_other_ids_is_refused(tmp_path):
    save_maps({"user": MAP}, tmp_path)
    with pytest.raises(InputError, match="maps 4 users, but log has 5"):
        load_maps(tmp_path, ["user"], log(5))


def hashed(folder, vectors):
    staging = artifact.begin(folder, kind=HASH)
    save_maps({"item": MAP}, staging)
    np.save(staging / "item" / ROW_VECTORS, vectors)
    artifact.commit(staging, folder, HASH, {})
    return open_maps(str(folder), None)


def test_row_vectors_are_checked(tmp_path):
    vectors = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(hashed(tmp_path / "good", vectors).rows("item"), vectors)
    with pytest.raises(InputError, match=r"float32 \(2, 2\), expected float32 \(3, dimension\)"):
        hashed(tmp_path / "short", vectors[:2]).rows("item")


def test_a_table_without_a_map_is_named(tmp_path):
    with pytest.raises(InputError, match="no map of the table 'user'; it has item"):
        hashed(tmp_path / "maps", np.ones((3, 2), np.float32)).map("user")
