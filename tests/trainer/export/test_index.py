"""Nearest-neighbor indexes of item vectors: recall against exact search, and a missing library."""

import importlib.util

import numpy as np
import pytest
import torch

from recpress.data.errors import InputError
from recpress.trainer.export import index as of_index
from recpress.trainer.export.index import build, check_library, exact_neighbors, recall


def clustered(rows, dim=16, seed=0):
    """(items, queries) around common centers, items of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(50, dim, generator=generator)

    def around(count):
        of = torch.randint(50, (count,), generator=generator)
        return centers[of] + 0.5 * torch.randn(count, dim, generator=generator)

    return around(rows) * (0.5 + torch.rand(rows, 1, generator=generator)), around(100)


def in_blocks(items):
    return lambda: iter(items.split(1000))


def test_exact_neighbors_are_those_of_a_full_sort():
    items, queries = clustered(3_500)
    scores, found = exact_neighbors(in_blocks(items), queries, 10)
    expected, at = (queries @ items.T).sort(1, descending=True)
    assert torch.allclose(scores, expected[:, :10], atol=1e-5)
    assert recall(found.numpy(), at[:, :10]) == 1.0
    assert recall(np.roll(found.numpy(), 1, 0), at[:, :10]) < 1.0


@pytest.mark.parametrize(("library", "rows"), [("faiss", 3_000), ("faiss", 25_000), ("usearch", 3_000)])
def test_a_stored_index_has_the_recall_that_it_says(library, rows, tmp_path):
    items, queries = clustered(rows)
    built = build(library, in_blocks(items), rows, queries, 0.97, tmp_path)
    assert built.recall >= 0.97
    assert ("exact" in built.kind) == (library == "faiss" and rows < of_index.FLAT)
    expected = exact_neighbors(in_blocks(items), queries, 100)[1]
    if library == "faiss":
        import faiss

        loaded = faiss.read_index(str(tmp_path / built.file))
        found = loaded.search(queries.numpy(), 100)[1]
        assert built.effort.get("nprobe", 0) == getattr(loaded, "nprobe", 0)
    else:
        from usearch.index import Index

        loaded = Index.restore(str(tmp_path / built.file))
        loaded.expansion_search = built.effort["expansion_search"]
        found = np.asarray(loaded.search(queries.numpy(), 100).keys).astype(np.int64)
    assert recall(found, expected) == pytest.approx(built.recall, abs=1e-3)


def test_a_recall_that_is_not_reached_is_a_warning(tmp_path, monkeypatch, caplog):
    items, queries = clustered(3_000)
    monkeypatch.setattr(of_index, "_LARGEST_EXPANSION", 1)
    monkeypatch.setattr(of_index, "recall", lambda found, expected: 0.5)
    assert build("usearch", in_blocks(items), 3_000, queries, 0.97, tmp_path).recall == 0.5
    assert "recall@100 is 0.5000, below --index-recall 0.97" in caplog.text


@pytest.mark.parametrize(("library", "package"), [("faiss", "faiss-cpu"), ("usearch", "usearch")])
def test_a_missing_library_is_named_with_its_package(library, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"{library} is not installed; expected `pip install {package}`"):
        check_library(library)
