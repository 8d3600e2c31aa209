"""Maps in plain operators give what the fast path of a CPU gives."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.map_ids import map_ids
from tests.modules.hashing.keyed_cases import batch, id_map


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_the_fast_path(packed: bool, weighted: bool, dtype: torch.dtype) -> None:
    maps = {"a": id_map(10, 4), "b": id_map(20, 7, 2, weighted, seed=3), "none": id_map(0, 5, 2)}
    bags = {"b": [[1, 25], [3]], "x": [[500], [-7]], "none": [[2], []], "a": [[9, -50], []]}
    for weights in (None, torch.rand(8).tolist()):
        features = batch(bags, weights)
        features = type(features)(features.keys(), features.values().to(dtype), features.weights_or_none(),
                                  features.lengths())  # fmt: skip
        hashes = LearnedHash(maps, packed=packed)
        want = hashes(features)
        found = map_ids(features, hashes.rows, hashes.weights, *hashes.options(), False)
        assert found.values().dtype == dtype
        assert torch.equal(found.values(), want.values())
        assert torch.equal(found.lengths(), want.lengths())
        assert found.length_per_key() == want.length_per_key()
        assert (want.weights_or_none() is None) == (found.weights_or_none() is None)
        if want.weights_or_none() is not None:
            torch.testing.assert_close(found.weights(), want.weights())
    with pytest.raises(ValueError, match="no feature 'a'"):
        map_ids(batch({"b": [[1]]}), hashes.rows, hashes.weights, *hashes.options(), False)
    with pytest.raises(RuntimeError, match="feature 'b' has an id that is not in 0 to 19"):
        map_ids(features, hashes.rows, hashes.weights, *hashes.options(), True)
