"""Chunks and heavy rows do not change the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.modules.als.half_sweep import Limits
from tests.modules.als.fit_cases import CONFIGS, log, run


@pytest.mark.parametrize("solver", ["auto", "cg", "cholesky"])
@pytest.mark.parametrize("valued", [False, True])
def test_chunks_change_nothing(solver, valued):
    config = replace(CONFIGS["half"], solver=solver)
    whole, objectives = run(config, log(valued))
    cut, cut_objectives = run(config, log(valued), limits=Limits(interactions=64, rows=5, heavy=64))
    assert (torch.diff(whole.users, dim=0) != 0).any()
    torch.testing.assert_close(cut.users, whole.users, rtol=0, atol=1e-4)
    torch.testing.assert_close(cut.items, whole.items, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cut_objectives, objectives, rtol=1e-5)


def test_a_row_in_pieces_is_exact():
    config = replace(CONFIGS["half"], solver="cholesky")
    whole, objectives = run(config, log(True))
    cut, cut_objectives = run(config, log(True), limits=Limits(interactions=9, rows=5, heavy=7))
    torch.testing.assert_close(cut.users, whole.users, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cut_objectives, objectives, rtol=1e-5)
