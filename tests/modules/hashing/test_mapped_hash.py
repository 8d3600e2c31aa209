"""Id maps on the host give the rows of `LearnedHash`."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.mapped_hash import MappedHash
from tests.modules.hashing.keyed_cases import batch, id_map


def test_the_data_workers_get_the_same_rows(tmp_path: Path) -> None:
    maps = {"a": id_map(50, 9), "b": id_map(20, 7, rows_per_id=2, weighted=True, seed=3)}
    for key, one in maps.items():
        (tmp_path / key).mkdir()
        one.save(tmp_path / key)
    mapped = pickle.loads(pickle.dumps(MappedHash({key: tmp_path / key for key in maps})))
    ids = torch.tensor([3, -7, 19, 20, 2**61, 0])
    learned = LearnedHash(maps)(batch({"a": [ids.tolist()], "b": [ids.tolist()]}))
    for key in maps:
        rows, weights = mapped.rows(key, ids)
        assert rows.flatten().tolist() == learned[key].values().tolist()
        assert (torch.ones(6) if weights is None else weights.flatten()).tolist() == learned[key].weights().tolist()
        of_numpy = mapped.rows(key, ids.numpy())[0]
        assert isinstance(of_numpy, np.ndarray)
        assert of_numpy.tolist() == rows.tolist()
    assert mapped.unknown_counts() == {"a": 4, "b": 6}
    strict = MappedHash({"a": tmp_path / "a"}, unknown="error")
    with pytest.raises(ValueError, match="feature 'a' has the id -7, expected 0 to 49"):
        strict.rows("a", ids)
    with pytest.raises(ValueError, match="'c' has no map"):
        strict.rows("c", ids)


@pytest.mark.parametrize("given", [None, [0.5, 1.0, 2.0, 0.25, 1.5, 4.0]])
@pytest.mark.parametrize(("rows_per_id", "weighted"), [(1, False), (2, False), (2, True)])
def test_the_map_on_the_host_called_with_a_batch(tmp_path, rows_per_id, weighted, given) -> None:
    maps = {"a": id_map(50, 9, rows_per_id, weighted), "b": id_map(20, 7, seed=3)}
    for key, one in maps.items():
        (tmp_path / key).mkdir()
        one.save(tmp_path / key)
    features = batch({"b": [[1, 90], []], "x": [[-4], [500]], "a": [[], [49, -1]]}, given)
    found, expected = MappedHash({key: tmp_path / key for key in maps})(features), LearnedHash(maps)(features)
    assert found.keys() == expected.keys()
    assert found.stride() == expected.stride()
    assert found.length_per_key() == expected.length_per_key()
    for name in ("values", "lengths", "weights_or_none"):
        one, other = getattr(found, name)(), getattr(expected, name)()
        assert (one is None) == (other is None)
        assert one is None or (one.tolist() == other.tolist() and one.dtype == other.dtype)


def test_the_map_on_the_host_called_with_ids(tmp_path) -> None:
    maps = {"a": id_map(50, 9), "two": id_map(20, 7, 2), "heavy": id_map(20, 7, 1, True)}
    for key, one in maps.items():
        (tmp_path / key).mkdir()
        one.save(tmp_path / key)
    ids = torch.tensor([3, 49, 0, 77])
    rows = MappedHash({"a": tmp_path / "a"})(ids)
    assert rows.tolist() == LearnedHash({"a": maps["a"]})(batch({"a": [ids.tolist()]})).values().tolist()
    two = MappedHash({"two": tmp_path / "two"})(ids)
    want = LearnedHash({"two": maps["two"]})(batch({"two": [ids.tolist()]}))
    assert two.shape == (4, 2)
    assert two.flatten().tolist() == want.values().tolist()
    heavy, weights = MappedHash({"heavy": tmp_path / "heavy"})(ids)
    want = LearnedHash({"heavy": maps["heavy"]})(batch({"heavy": [ids.tolist()]}))
    assert heavy.shape == weights.shape == (4, 1)
    assert (heavy.flatten().tolist(), weights.flatten().tolist()) == (want.values().tolist(), want.weights().tolist())
    with pytest.raises(ValueError, match="MappedHash of one feature"):
        MappedHash({key: tmp_path / key for key in maps})(ids)
    with pytest.raises(ValueError, match="no feature 'a'"):
        MappedHash({"a": tmp_path / "a"})(batch({"b": [[1]]}))


def test_on_the_host_any_integers_are_ids(tmp_path: Path) -> None:
    one = id_map(20, 7)
    one.save(tmp_path)
    mapped = MappedHash({"a": tmp_path})
    want = one.rows[:3].tolist()
    for kind in (np.uint64, np.int8, np.uint16, np.int32):
        assert mapped.rows("a", np.arange(3, dtype=kind))[0].tolist() == want
    assert mapped.rows("a", np.array([2**64 - 1], np.uint64))[0].tolist() == one.hashed(torch.tensor([-1])).tolist()
    for ids in (np.array([1.5]), np.array([[1]]), np.array(["x"]), np.array([True])):
        with pytest.raises(ValueError, match=r"'a'.*integers"):
            mapped.rows("a", ids)
