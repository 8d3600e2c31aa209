"""What hashing methods require of a table, and what they reject."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.methods import METHODS, build_map
from recpress.modules.hashing.table_stats import TableStats
from tests.modules.hashing.table_cases import made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, -1, 201])
def test_a_budget_that_is_none_is_refused(method: str, rows: int) -> None:
    with pytest.raises(ValueError, match=rf"'items': a budget of {rows} rows, expected 1 to 200"):
        build_map(made(200), rows, HashConfig(method=method))


@pytest.mark.parametrize("method", ["frequency", "hybrid", "learned"])
def test_counts_are_asked_for(method: str) -> None:
    with pytest.raises(ValueError, match=f"'items': method '{method}' needs the counts"):
        build_map(made(10, counts=None), 5, HashConfig(method=method))


@pytest.mark.parametrize("method", ["cluster", "learned"])
def test_an_embedding_is_asked_for(method: str) -> None:
    with pytest.raises(ValueError, match=f"'items': method '{method}' needs an embedding"):
        build_map(made(10, embedding=None), 5, HashConfig(method=method))


@pytest.mark.parametrize(
    "config", [HashConfig(method="learned"), HashConfig(method="cluster"), HashConfig(rows_per_id=2)]
)
def test_a_tables_own_weight_is_an_embedding(config):
    weight = torch.nn.Parameter(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)))
    counts = torch.arange(60.0, requires_grad=True)
    found = build_map(TableStats(name="t", num_ids=60, counts=counts, embedding=weight), 7, config)
    want = build_map(TableStats(name="t", num_ids=60, counts=counts.detach(), embedding=weight.detach()), 7, config)
    assert torch.equal(found.rows, want.rows)
    assert weight.grad is None


def test_tensors_without_dense_values_are_refused():
    for values in (torch.empty(6, 2, device="meta"), torch.eye(6).to_sparse()):
        with pytest.raises(ValueError, match="'t': embedding is a tensor"):
            TableStats(name="t", num_ids=6, embedding=values)


def test_counts_may_be_an_array_or_a_list():
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    counts = list(range(60))
    want = TableStats(name="t", num_ids=60, counts=torch.tensor(counts).double(), embedding=vectors)
    for given in (counts, np.array(counts, np.float32), np.array(counts, np.uint64)):
        found = TableStats(name="t", num_ids=60, counts=given, embedding=vectors)
        for method in ("learned", "frequency"):
            config = HashConfig(method=method)
            assert torch.equal(build_map(found, 7, config).rows, build_map(want, 7, config).rows)
    with pytest.raises(ValueError, match=r"'t': counts have shape \(59,\), expected \(60,\)"):
        TableStats(name="t", num_ids=60, counts=counts[1:])
    for bad in ([[1], [2, 3]], ["many"] * 60):
        with pytest.raises(ValueError, match="'t': counts are no numbers"):
            TableStats(name="t", num_ids=60, counts=bad)
