"""Every method by name: what each promises, and what all of them refuse."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.methods import METHODS, build_map
from recpress.modules.hashing.table_stats import TableStats
from tests.modules.hashing.table_cases import made

COMPUTED = ("modulo", "universal", "double", "quotient-remainder")


@pytest.mark.parametrize("method", METHODS)
def test_a_map_meets_its_budget_and_says_what_it_is(method: str) -> None:
    table = made(200)
    found = build_map(table, 60, HashConfig(method=method, seed=5))
    assert found.num_ids == 200
    assert found.num_rows <= 60
    assert (found.method, found.vocabulary, found.seed) == (method, "v1", 5)
    assert found.computed == (method in COMPUTED)
    again = build_map(table, 60, HashConfig(method=method, seed=5))
    assert torch.equal(found.rows, again.rows)


@pytest.mark.parametrize("method", ["learned", "cluster"])
def test_with_a_row_for_each_id_no_id_shares(method: str) -> None:
    found = build_map(made(50), 50, HashConfig(method=method))
    assert len(found.rows.unique()) == 50


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"quotient-remainder"}))
def test_one_row_is_enough(method: str) -> None:
    found = build_map(made(50), 1, HashConfig(method=method, exclusive_share=0))
    assert found.num_rows == 1


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'magic'; expected one of modulo, universal,.*learned"):
        build_map(made(10), 5, HashConfig(method="magic"))


@pytest.mark.parametrize(
    "config", [HashConfig(method="learned"), HashConfig(method="cluster"), HashConfig(rows_per_id=2)]
)
def test_vectors_whose_distances_overflow_are_refused(config):
    values = torch.ones(60, 8)
    values[3] = 1e30
    with pytest.raises(ValueError, match=r"'t': row 3 .*1e\+30.*overflow"):
        build_map(TableStats(name="t", num_ids=60, counts=torch.ones(60), embedding=values), 7, config)
