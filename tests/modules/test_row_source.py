"""Matrices that are read in blocks, and loaded into tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from recpress.modules import row_source
from recpress.modules.row_source import LogCounts, blocks, check_source, gather_rows, load_rows, round_up, sample_rows

VALUES = np.arange(60, dtype=np.float32).reshape(12, 5)


@pytest.mark.parametrize("source", [VALUES, torch.from_numpy(VALUES)])
def test_blocks_are_a_rectangle_padded_with_zeros(source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_source, "BLOCK_BYTES", 4 * 6 * 2)  # two rows of six columns
    found = list(blocks(source, "t", (1, 8), (2, 8)))
    assert [first for first, _ in found] == [1, 3, 5, 7]
    expected = np.pad(VALUES, ((0, 0), (0, 3)))[1:8, 2:8]
    assert torch.equal(torch.cat([block for _, block in found]), torch.from_numpy(expected))


def test_values_that_are_not_finite_or_too_large_are_named() -> None:
    bad = VALUES.copy()
    bad[7, 1] = np.nan
    with pytest.raises(ValueError, match="table 't': row 7 of the source holds NaN"):
        list(blocks(bad, "t", (0, 12), (0, 5)))
    with pytest.raises(ValueError, match="table 't': row 9 of the source holds 49, expected at most 48"):
        list(blocks(VALUES, "t", (0, 12), (0, 5), largest=48.0))


def test_a_source_must_fit_its_table() -> None:
    check_source(VALUES, "t", 12, 5)
    check_source(VALUES, "t", 12, round_up(5))
    for rows, dim, message in ((11, 5, "12 rows, expected 11"), (12, 12, "dimension 5, expected 12")):
        with pytest.raises(ValueError, match=message):
            check_source(VALUES, "t", rows, dim)
    with pytest.raises(ValueError, match=r"shape \(60,\)"):
        check_source(VALUES.ravel(), "t", 12, 5)


@pytest.mark.parametrize("source", [VALUES, torch.from_numpy(VALUES)])
def test_rows_are_gathered_and_sampled(source) -> None:
    ids = torch.tensor([0, 3, 11])
    assert torch.equal(gather_rows(source, ids), torch.from_numpy(VALUES)[ids])
    assert torch.equal(sample_rows(source), torch.from_numpy(VALUES))
    assert 64 <= len(sample_rows(np.zeros((10_000, 2), np.float32), limit=128)) <= 130


def test_rows_are_loaded_into_a_trainable_table() -> None:
    tables = [EmbeddingBagConfig(name="t", num_embeddings=12, embedding_dim=8, feature_names=["f"])]
    collection = EmbeddingBagCollection(tables=tables)
    load_rows(collection.state_dict()["embedding_bags.t.weight"], "t", VALUES)
    weight = collection.embedding_bags["t"].weight.detach()
    assert torch.equal(weight, torch.from_numpy(np.pad(VALUES, ((0, 0), (0, 3)))))


def test_log_counts_of_a_sample_compare_with_those_of_the_log() -> None:
    counts = np.random.default_rng(0).integers(1, 1000, (500, 1)).astype(np.float32)
    whole = LogCounts(counts)
    assert abs(float(whole[:].mean())) < 1e-5
    assert float(whole[:].std()) == pytest.approx(1, abs=0.01)
    tenth = LogCounts(counts / 10, share=0.1, like=whole)
    assert torch.allclose(tenth[:], whole[:], atol=1e-5)
