"""Exclusive rows for the most frequent ids."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.methods import build_map
from tests.modules.hashing.table_cases import made


def test_frequency_gives_the_frequent_ids_rows_of_their_own() -> None:
    counts = torch.tensor([1.0, 9, 3, 9, 5, 0, 2, 7])
    found = build_map(made(8, counts=counts), 6, HashConfig(method="frequency")).rows[:, 0].tolist()
    # 3 private: ids 1, 3 (a tie, lower first), 7; the others at 3 + id mod 3
    assert found == [3, 0, 5, 1, 4, 5, 3, 2]


@pytest.mark.parametrize("private", [0.0, 0.25, 1.0])
def test_hybrid_hashes_the_others_into_the_shared_rows(private: float) -> None:
    rows = 200 if private == 1 else 40
    table = made(200)
    found = build_map(table, rows, HashConfig(method="hybrid", exclusive_share=private)).rows
    number = int(private * rows)
    top = torch.sort(table.counts, descending=True, stable=True).indices[:number]
    assert torch.equal(found[top], torch.arange(number, dtype=torch.int32)[:, None].expand(-1, 2))
    tail = torch.ones(200, dtype=torch.bool)
    tail[top] = False
    assert bool((found[tail] >= number).all())


@pytest.mark.parametrize("method", ["frequency", "hybrid", "learned"])
@pytest.mark.parametrize(("private", "why"), [(1.0, "leave none for the other 190 ids"), (1.5, "expected 0 to 1")])
def test_a_share_that_leaves_nothing_is_refused(method: str, private: float, why: str) -> None:
    with pytest.raises(ValueError, match=f"'items': .*{why}"):
        build_map(made(200), 10, HashConfig(method=method, exclusive_share=private))
