"""Import paths and names of the last version."""

import importlib
import subprocess
import sys

import pytest

from recpress._moved import MOVED, NAMES
from recpress.modules.config import HashConfig


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_names_of_the_new_module(old, monkeypatch):
    new = importlib.import_module(MOVED[old])
    package, _, leaf = old.rpartition(".")
    monkeypatch.setattr(importlib.import_module(package), leaf, None, raising=False)  # the import sets it
    monkeypatch.setitem(sys.modules, old, None)
    del sys.modules[old]
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        moved = importlib.import_module(old)
    name = next(name for name in vars(new) if not name.startswith("_") and name != "annotations")
    assert getattr(moved, name) is getattr(new, name)
    for name, place in NAMES.get(old, {}).items():
        module, _, now = place.partition(":")
        assert getattr(moved, name) is getattr(importlib.import_module(module), now)
    with pytest.raises(AttributeError):
        moved.no_such_name  # noqa: B018


def test_a_script_of_the_last_version_runs():
    script = """
from recpress.modules.compress import compress
from recpress.modules import compress as again
from recpress.modules.config import HashConfig
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.problem import IdTable
from recpress.modules.als import ALS
from recpress.data.stream import InteractionStream
from recpress.data.log import iter_columns, open_log
import torch
counts = torch.arange(60)
made = build_map(IdTable(name="t", num_ids=60, counts=counts, embedding=torch.randn(60, 4)), 7, HashConfig(ways=2))
assert made.rows.shape == (60, 2)
assert callable(again)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_keywords_of_a_hash_config_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="rows_per_id"):
        assert HashConfig(ways=2) == HashConfig(rows_per_id=2)
    with pytest.raises(TypeError):
        HashConfig(wayz=2)


def test_no_other_module_is_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("recpress.data.nothing")
