"""`compare hash --backbone softmax`: learned maps of unit vectors, trained by the contrastive loss."""

from __future__ import annotations

import pytest

from recpress.modules.config import ContrastiveConfig
from recpress.trainer.compare.hash import compare_hash
from tests.trainer.compare.configs import hash_config

pytestmark = pytest.mark.slow  # trains models


def test_the_learned_map_keeps_more_than_the_hashing_trick(tmp_path):
    result = compare_hash(
        hash_config(
            tmp_path / "out",
            backbone="softmax",
            softmax=ContrastiveConfig(factors=8, temperature=0.2, epochs=20, negatives=128),
            methods=("modulo", "learned-2"),
            shared_epochs=(0, 5),
            trials=2,
        )
    )
    recall = {method.key: method.mean("Recall@10") for method in result.methods}
    assert recall["learned-2"] > 1.5 * recall["modulo"]
    assert recall["full"] > recall["modulo"]
    assert result.method("learned-2").setting["sweeps"] in (0, 5)
    assert any("contrastive" in note for note in result.notes)
