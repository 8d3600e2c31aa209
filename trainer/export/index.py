"""A nearest-neighbor index of item vectors, by faiss or usearch, with its recall against exact search."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

Library = Literal["faiss", "usearch"]
Vectors = Callable[[], Iterator[torch.Tensor]]
"""All item vectors in order, in blocks (b, d) float32; may be called again."""
PACKAGES: dict[Library, str] = {"faiss": "faiss-cpu", "usearch": "usearch"}
NEIGHBORS = 100
"""Recall is measured on this many items per query."""
QUERIES = 500
FLAT = 20_000
"""With fewer items faiss searches all of them."""
_PER_LIST = 64  # vectors per list that train the lists
_ITERATIONS = 10  # of k-means
_MOST_LISTS = 1 << 14
_LARGEST_EXPANSION = 1 << 13


def check_library(library: Library) -> None:
    """Raise InputError if the library is not installed."""
    if importlib.util.find_spec(library) is None:
        raise InputError(
            f"index: {library} is not installed; expected `pip install {PACKAGES[library]}`, or --index none"
        )


@dataclass(frozen=True)
class Built:
    """An index, with the effort that reaches the recall."""

    library: Library
    kind: str
    effort: dict[str, int]
    """Parameter of the search; empty: the search is exact."""
    recall: float
    file: str

    def describe(self, queries: int, neighbors: int) -> dict[str, Any]:
        """Entry of the manifest."""
        return {
            "file": self.file,
            "library": self.library,
            "version": importlib.metadata.version(PACKAGES[self.library]),
            "kind": self.kind,
            "metric": "inner product",
            "labels": "dense item ids",
            "effort": self.effort,
            f"recall@{neighbors}": self.recall,
            "queries": queries,
        }


def exact_neighbors(vectors: Vectors, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, items) of the k best items of each query (q, d), by exact search: (q, k) each."""
    scores, items, first = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64), 0
    for block in vectors():
        found = queries @ block.T
        ids = torch.arange(first, first + len(block)).expand(len(queries), -1)
        scores, items = torch.cat([scores, found], 1), torch.cat([items, ids], 1)
        scores, at = scores.topk(min(k, scores.shape[1]), 1)
        items = items.gather(1, at)
        first += len(block)
    return scores, items


def recall(found: np.ndarray, expected: torch.Tensor) -> float:
    """Share of the expected items (q, k) that were found (q, k)."""
    hits = (torch.from_numpy(found)[:, :, None] == expected[:, None, :]).any(1)
    return float(hits.float().mean())


def build(
    library: Library, vectors: Vectors, num_items: int, queries: torch.Tensor, least_recall: float, folder: Path
) -> Built:
    """Build an index, write it to `folder`, and choose the smallest effort that reaches the recall.

    Warns if no effort does.
    """
    expected = exact_neighbors(vectors, queries, min(NEIGHBORS, num_items))[1]
    built = (_faiss if library == "faiss" else _usearch)(vectors, num_items, queries, expected, least_recall, folder)
    if built.recall < least_recall:
        logger.warning(
            f"index: recall@{expected.shape[1]} is {built.recall:.4f}, below --index-recall {least_recall}, with the "
            f"largest effort that {library} was given"
        )
    return built


def _faiss(
    vectors: Vectors, num_items: int, queries: torch.Tensor, expected: torch.Tensor, least_recall: float, folder: Path
) -> Built:
    """Inverted lists, with all vectors as they are."""
    import faiss

    dim, file = queries.shape[1], "items.faiss"
    flat = num_items < FLAT
    index: Any = faiss.IndexFlatIP(dim)
    if not flat:
        lists = min(_MOST_LISTS, int(4 * num_items**0.5))
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = _ITERATIONS
        index.train(_sample(vectors, num_items, lists * _PER_LIST))
    for block in vectors():
        index.add(block.numpy())
    k, asked = expected.shape[1], queries.numpy()
    effort: dict[str, int] = {}
    found = recall(index.search(asked, k)[1], expected)
    if not flat:
        for probes in _growing(1, index.nlist):
            index.nprobe = probes
            found = recall(index.search(asked, k)[1], expected)
            if found >= least_recall:
                break
        effort = {"nprobe": index.nprobe}
    faiss.write_index(index, str(folder / file))
    kind = "exact (IndexFlatIP)" if flat else f"IndexIVFFlat, {index.nlist} lists"
    return Built("faiss", kind, effort, found, file)


def _usearch(
    vectors: Vectors, num_items: int, queries: torch.Tensor, expected: torch.Tensor, least_recall: float, folder: Path
) -> Built:
    """A navigable graph (HNSW)."""
    from usearch.index import Index

    dim, file, first = queries.shape[1], "items.usearch", 0
    index: Any = Index(ndim=dim, metric="ip", dtype="f32", connectivity=32, expansion_add=256)
    for block in vectors():
        index.add(np.arange(first, first + len(block)), block.numpy())
        first += len(block)
    k, found = expected.shape[1], 0.0
    for expansion in _growing(k, _LARGEST_EXPANSION):
        index.expansion_search = expansion
        keys = index.search(queries.numpy(), k).keys
        found = recall(np.asarray(keys).astype(np.int64).reshape(len(queries), -1), expected)
        if found >= least_recall:
            break
    index.save(str(folder / file))
    return Built("usearch", "HNSW", {"expansion_search": index.expansion_search}, found, file)


def _growing(first: int, last: int) -> Iterator[int]:
    """first, ..., last, each about 1.4 times the one before."""
    value = float(first)
    while int(value) < last:
        yield int(value)
        value = max(value * 1.4, value + 1)
    yield last


def _sample(vectors: Vectors, num_items: int, count: int) -> np.ndarray:
    """About `count` vectors, at random."""
    generator = torch.Generator().manual_seed(0)
    share = min(1.0, count / num_items)
    parts = [block[torch.rand(len(block), generator=generator) < share] for block in vectors()]
    return torch.cat(parts).numpy()
