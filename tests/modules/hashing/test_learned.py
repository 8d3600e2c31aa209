"""The learned hash function: what frequency and embedding each do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing import learned as learned_module
from recpress.modules.hashing import two_row as two_row_module
from recpress.modules.hashing.learned import learned
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats

GROUPS = 10


def made(num_ids: int = 1000, power: float = 1.0) -> TableStats:
    """Ids of ten groups of like vectors; counts fall off as 1 / rank, whatever the group."""
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(GROUPS, 4, generator=generator)
    vectors = middles[torch.arange(num_ids) % GROUPS] + 0.3 * torch.randn(num_ids, 4, generator=generator)
    rank = torch.randperm(num_ids, generator=generator) + 1
    return TableStats(
        name="items", num_ids=num_ids, counts=(1e6 / rank.float() ** power).round(), embedding=vectors.contiguous()
    )


def weighted_distortion(table: TableStats, rows: torch.Tensor, num_rows: int, power: float) -> float:
    weights = table.counts**power
    mass = torch.zeros(num_rows).index_add_(0, rows, weights)
    middle = torch.zeros(num_rows, 4).index_add_(0, rows, table.embedding * weights[:, None]) / mass[:, None]
    return float((weights * (table.embedding - middle[rows]).square().sum(1)).sum())


def test_alike_ids_share_and_others_do_not() -> None:
    table = made()
    rows = build_map(table, GROUPS, HashConfig(count_exponent=0)).rows[:, 0]
    for group in range(GROUPS):
        assert len(rows[group::GROUPS].unique()) == 1
    assert len(rows.unique()) == GROUPS


def test_frequent_ids_earn_rows_that_only_rare_ids_share() -> None:
    table = made()
    by_count = torch.sort(table.counts, descending=True, stable=True).indices
    both = learned(table, 100, HashConfig(count_exponent=1)).rows[:, 0]
    alone = build_map(table, 100, HashConfig(method="cluster")).rows[:, 0]
    assert len(both[by_count[:20]].unique()) == 20
    assert weighted_distortion(table, both.long(), 100, 1) < 0.85 * weighted_distortion(table, alone.long(), 100, 1)
    for row in both.unique():
        assert len((torch.arange(1000)[both == row] % GROUPS).unique()) == 1  # ids still share with their likes


def test_the_split_of_its_own_choice_is_no_worse_than_any_by_hand() -> None:
    table = made()
    chosen = weighted_distortion(table, learned(table, 100, HashConfig()).rows[:, 0].long(), 100, 0.5)
    for private in (0.1, 0.3, 0.5, 0.7):
        rows = learned(table, 100, HashConfig(exclusive_share=private)).rows[:, 0].long()
        assert chosen < 1.02 * weighted_distortion(table, rows, 100, 0.5)


@pytest.mark.parametrize("private", [0.25, 0.8])
def test_private_rows_by_hand_go_to_the_most_frequent(private: float) -> None:
    table = made()
    rows = learned(table, 100, HashConfig(exclusive_share=private)).rows[:, 0].long()
    number = int(100 * private)
    top = torch.sort(table.counts, descending=True, stable=True).indices[:number]
    assert torch.equal(rows[top], torch.arange(number))
    tail = torch.ones(1000, dtype=torch.bool)
    tail[top] = False
    assert int(rows[tail].min()) == number
    assert len(rows.unique()) == 100


def test_it_reads_a_matrix_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clustered part of a numpy matrix, in blocks of 10 ids, gives the rows of the tensor."""
    table = made(300)
    monkeypatch.setattr("recpress.modules.row_source.BLOCK_BYTES", 160)
    array = TableStats(name="items", num_ids=300, counts=table.counts, embedding=np.asarray(table.embedding))
    config = HashConfig(exclusive_share=0.5)
    assert torch.equal(learned(array, 60, config).rows, learned(table, 60, config).rows)


def test_a_vector_that_is_not_finite_is_refused() -> None:
    table = made(300)
    table.embedding[17] = float("nan")
    with pytest.raises(ValueError, match="'items': row 17 of the source holds NaN"):
        learned(table, 30, HashConfig())


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides(seed: int) -> None:
    table = made()
    config = HashConfig(seed=seed, iterations=2)
    assert torch.equal(learned(table, 50, config).rows, learned(table, 50, config).rows)
    assert not torch.equal(learned(table, 50, config).rows, learned(table, 50, HashConfig(seed=9, iterations=2)).rows)


@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("settings", [{}, {"exclusive_share": 0.5}, {"method": "cluster"}, {"rows_per_id": 2}])
@pytest.mark.parametrize("rows", [40, 150])
def test_ids_that_never_occur_and_are_alike_are_clustered_as_one(exponent, settings, rows, monkeypatch) -> None:
    """Of a large hashed column most ids never occur: clusters of 100 ids cost the same among 3,000."""
    given = made(100)
    ids = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:100].sort().values
    counts, vectors = torch.zeros(3000), torch.zeros(3000, 4)
    counts[ids], vectors[ids] = given.counts, given.embedding
    own = 17 if 17 not in ids else 18  # never occurs, but has a vector
    vectors[own] = vectors[ids[3]]
    table = TableStats(name="items", num_ids=3000, counts=counts, embedding=vectors)
    sizes = []
    k_means = learned_module.k_means
    for module in (learned_module, two_row_module):
        monkeypatch.setattr(module, "k_means", lambda x, *a, **k: sizes.append(x.shape[0]) or k_means(x, *a, **k))
    found = build_map(table, rows, HashConfig(count_exponent=exponent, **settings))
    assert max(sizes) <= 102
    assert found.num_rows == rows
    chosen = torch.ones(3000, dtype=torch.bool)
    chosen[ids] = chosen[own] = False
    if settings.get("rows_per_id") == 2:
        assert len(found.rows[chosen].unique(dim=0)) == 1
        return
    of = found.rows[:, 0]
    assert of[own] == of[ids[3]] or rows > 40 or "exclusive_share" in settings
    if rows == 40:
        assert len(of[chosen].unique()) == 1
    else:  # the rows that nobody needs are for ids that are not known yet
        assert len(of[ids].unique()) == 100
        assert len(of[chosen].unique()) > 20
        assert not set(of[chosen].tolist()[1:]) & set(of[ids].tolist())
