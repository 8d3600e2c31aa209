"""CCE: a clustering keeps vectors that its centers can hold, and draws helper rows anew."""

import pytest
import torch

from recpress.trainer.compare.click.cce import ClusteredTable


def test_the_vector_of_an_id_has_a_main_and_a_helper_row_per_chunk():
    table = ClusteredTable(ids=6, rows=8, dim=4, chunks=2, seed=0, clusterings=1)
    assert table.numbers.weight.numel() == 8 * 4
    main, helper = table.pointers[:, 3]
    weight = table.numbers.weight
    expected = torch.cat([weight[main[chunk]] + weight[helper[chunk]] for chunk in (0, 1)])
    assert torch.equal(table(torch.tensor([3]))[0], expected)
    assert main[0] < 4 <= main[1] < 8 <= helper[0] < 12 <= helper[1] < 16


def test_clustering_keeps_as_many_different_vectors_as_there_are_rows():
    table = ClusteredTable(ids=60, rows=8, dim=4, chunks=2, seed=0, clusterings=1)
    table.numbers.weight.data[8:] = 0  # without helper rows each chunk has at most 4 different parts
    before, helpers = table(torch.arange(60)).detach(), table.pointers[1].clone()
    table.after_epoch()
    assert torch.allclose(table(torch.arange(60)), before, atol=1e-6)
    assert not torch.equal(table.pointers[1], helpers)


def test_clustering_groups_similar_ids_and_leaves_their_mean_residuals_to_the_helpers():
    table = ClusteredTable(ids=40, rows=4, dim=2, chunks=1, seed=0, clusterings=1)
    table.pointers[0, :, 0] = torch.arange(40) % 2
    table.numbers.weight.data = torch.tensor([[10.0, 0], [-10, 0], [0, 1], [0, -1]])
    table.after_epoch()
    groups = table.pointers[0, :, 0]
    assert len(set(groups[::2].tolist())) == len(set(groups[1::2].tolist())) == 1
    assert groups[0] != groups[1]
    residual_before = torch.tensor([0.0, 1]).abs().sum()
    assert table(torch.arange(40))[:, 1].abs().mean() < residual_before


def test_clusterings_end():
    table = ClusteredTable(ids=20, rows=4, dim=2, chunks=1, seed=0, clusterings=1)
    table.after_epoch()
    pointers = table.pointers.clone()
    table.after_epoch()
    assert torch.equal(table.pointers, pointers)


def test_rows_that_make_no_two_tables_are_refused():
    with pytest.raises(ValueError, match="1 rows"):
        ClusteredTable(ids=20, rows=1, dim=4, chunks=2, seed=0, clusterings=1)
