"""How tables are stored at a level of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recpress.data.errors import InputError
from recpress.trainer.compare.both import compare_both
from recpress.trainer.compare.both_tables import decode
from tests.ranks import run_on_ranks
from tests.trainer.compare.configs import both_config


def test_a_level_below_the_maps_is_refused(tmp_path: Path) -> None:
    config = both_config(tmp_path / "both", levels=(0.01,))
    with pytest.raises(InputError, match=r"levels: 0\.01 of the full tables' bytes does not hold the maps"):
        run_on_ranks(compare_both, 1, config)
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(("storage", "error"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 1e-2), ("int4", 0.2)])
def test_decoded_vectors_have_the_error_of_their_storage(storage, error):
    table = torch.linspace(-1, 1, 5 * 6).reshape(5, 6)  # a dimension that storage pads
    found = decode(table, storage)
    assert found.shape == table.shape
    assert (found - table).abs().max() <= error
