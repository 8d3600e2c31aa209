"""How many rows each table gets."""

from types import SimpleNamespace

import pytest
import torch

from recpress.data.errors import InputError
from recpress.trainer.hash.budget import budget, root, rows_of_tables
from recpress.trainer.hash.config import HashStageConfig

TABLES = [
    SimpleNamespace(name="user", num_ids=900, embedding=torch.zeros(900, 8)),
    SimpleNamespace(name="item", num_ids=100, embedding=torch.zeros(100, 8)),
]


def config(**values):
    return HashStageConfig(data="log", out="maps", method="modulo", **values)


@pytest.mark.parametrize(
    ("values", "rows"), [({"share": 0.1}, 100), ({"rows": 70}, 70), ({"bytes": 50 * 8 * 4 + 3}, 50)]
)
def test_a_budget_is_a_share_a_number_or_bytes(values, rows):
    assert budget(config(**values), TABLES) == rows


def test_tables_share_it_in_proportion_to_their_ids():
    assert rows_of_tables(config(share=0.5), TABLES) == [449, 51]


def test_a_table_with_rows_of_its_own_leaves_the_rest():
    assert rows_of_tables(config(rows=100, table_rows=("item=40",)), TABLES) == [60, 40]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 1}, "expected 2 to 1,000"),
        ({"table_rows": ("itm=4",)}, "no table 'itm'; tables are user, item"),
        ({"table_rows": ("item=none",)}, "item=none, expected a number of rows"),
        ({"rows": 10, "table_rows": ("item=10",)}, "leave too few"),
    ],
)
def test_what_cannot_be_is_one_error(values, message):
    with pytest.raises(InputError, match=message):
        rows_of_tables(config(**values), TABLES)


def test_the_root_of_a_matrix():
    half = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    matrix = half @ half.T
    assert torch.allclose(root(matrix) @ root(matrix), matrix, atol=1e-4)
