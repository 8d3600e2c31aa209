"""How fast is the index of `recpress export` against exact search, and which part of the items does it find?

Takes 30 s small, 10 minutes full, alone on two cores.

    python benchmarks/index.py --items 1000000 --dim 64 --out runs/index.json

Synthetic item vectors in clusters; recall@100 on users that the effort of the search was not chosen with.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.trainer.export.index import NEIGHBORS, QUERIES, build, exact_neighbors, recall

SMALL = ("--items", "50000", "--dim", "32")
FULL = ("--items", "1000000")

TASTES = 2_000


def vectors(items: int, users: int, dim: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Items around the centers of tastes, popular ones longer; users like a mixture of two tastes."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(TASTES, dim, generator=generator)
    of = torch.randint(TASTES, (items,), generator=generator)
    length = (1 + torch.rand(items, 1, generator=generator)) / 2
    found = (centers[of] + spread * torch.randn(items, dim, generator=generator)) * length
    two = torch.randint(TASTES, (2, users), generator=generator)
    return found, centers[two[0]] + 0.5 * centers[two[1]] + 0.3 * torch.randn(users, dim, generator=generator)


def per_second(search: Callable[[], Any], queries: int) -> float:
    """Queries per second: the best of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        search()
        times.append(time.perf_counter() - start)
    return queries / min(times)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--library", choices=("faiss", "usearch"), default="faiss")
    parser.add_argument("--least-recall", type=float, default=0.98)
    parser.add_argument("--spread", type=float, default=0.5, help="of items around the center of their taste")
    options = parser.parse_args()
    items, users = vectors(options.items, 2 * QUERIES, options.dim, options.spread)
    tuning, asked = users[:QUERIES], users[QUERIES:]  # recall is measured on other users than the effort
    exact = faiss.IndexFlatIP(options.dim)
    exact.add(items.numpy())
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        built = build(
            options.library,
            lambda: iter(items.split(1 << 16)),
            options.items,
            tuning,
            options.least_recall,
            Path(name),
        )
        seconds, size = time.perf_counter() - start, (Path(name) / built.file).stat().st_size
        search = _search(options.library, Path(name) / built.file, built.effort)
    given = asked.numpy()
    truth = exact_neighbors(lambda: iter(items.split(1 << 16)), asked, NEIGHBORS)[1]
    found = recall(search(given), truth)
    fast = per_second(lambda: search(given), len(given))
    slow = per_second(lambda: exact.search(given, NEIGHBORS), len(given))
    result = {
        "library": options.library, "items": options.items, "spread": options.spread, "recall@100": found,
        "queries/s": fast, "exact, queries/s": slow, "faster": fast / slow, "build s": seconds, "MB": size / 1e6,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    settings = settings_of(vars(options)) | {"kind": built.kind, "effort": built.effort}
    publish(str(__doc__).splitlines()[0], [result], out=options.out, settings=settings)


def _search(library: str, path: Path, effort: dict[str, int]) -> Callable[[np.ndarray], np.ndarray]:
    if library == "faiss":
        index: Any = faiss.read_index(str(path))
        return lambda given: index.search(given, NEIGHBORS)[1]
    from usearch.index import Index

    graph: Any = Index.restore(str(path))
    graph.expansion_search = effort["expansion_search"]
    return lambda given: np.asarray(graph.search(given, NEIGHBORS, threads=1).keys).astype(np.int64)


if __name__ == "__main__":
    main()
