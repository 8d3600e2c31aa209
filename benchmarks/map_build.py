"""How long does the clustering of `learned` and `cluster` take, and in how much memory, compared with faiss's k-means?

Takes 20 s small, 7 minutes full, alone on two cores.

    python benchmarks/map_build.py                                                  # both, growing numbers of ids
    python benchmarks/map_build.py --ids 100000000 --iterations 5                   # as far as the machine allows

Synthetic data: ids in a mixture of Gaussians, written to a temporary file and memory-mapped; an id's count falls off as
a power of its rank, and its weight is the root of its count. There are a tenth as many rows as ids. Each run has its
own process; ours and faiss's take turns, with the same weights, iterations and threads. The first value of each option
is the base; ids, dimension and threads are varied one at a time. One rank builds the maps of a job, so ranks are not
varied. `ids/s`: ids times iterations over seconds. Distortion is sum_i w_i |v_i - c_row(i)|^2 with each row the
weighted mean of its ids, computed here for both, in float64. Memory is the peak above that before the clustering,
without the pages of the memory map, which the kernel can reclaim (Linux); faiss needs the matrix in memory, which
counts. faiss compares each id with each row, so that it is not run above `--most-faiss` ids.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recpress.benchmarks.common import MISSING, arguments, installed, lines, publish, settings_of
from recpress.benchmarks.processes import status_bytes

SMALL = ("--ids", "20000", "5000", "--dims", "16", "8", "--iterations", "5")

BLOCK = 1 << 19
"""Ids that are made at a time."""


class Case(NamedTuple):
    """What is clustered."""

    ids: int
    dim: int
    """Numbers of an id's vector."""
    threads: int
    rows: int


def make(folder: Path, ids: int, dim: int, seed: int = 0) -> None:
    """Write `vectors.npy` (ids, dim) and `weights.npy` (ids,), float32."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((max(16, min(ids // 100, 20_000)), dim), np.float32)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (ids, dim))
    weights = np.lib.format.open_memmap(folder / "weights.npy", "w+", np.float32, (ids,))
    for first in range(0, ids, BLOCK):
        size = min(BLOCK, ids - first)
        noise = rng.standard_normal((size, dim), np.float32)
        vectors[first : first + size] = middles[rng.integers(0, len(middles), size)] + 0.5 * noise
        weights[first : first + size] = np.sqrt((rng.random(size, np.float32) + 1e-6) ** -0.8)
    vectors.flush()
    weights.flush()


class Peak:
    """Peak of anonymous memory (RssAnon) above that at the start, read 20 times per second."""

    def __enter__(self) -> Peak:
        self._start = self.bytes = status_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes -= self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.bytes = max(self.bytes, status_bytes("RssAnon"))


def ours(folder: Path, case: Case, args: argparse.Namespace) -> Callable[[], np.ndarray]:
    """A clustering that is ready to run; returns the row of each id."""
    import torch

    from recpress.modules.hashing.k_means import k_means

    torch.set_num_threads(case.threads)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    weights = torch.from_numpy(np.load(folder / "weights.npy"))

    def run() -> np.ndarray:
        found = k_means(vectors, weights, case.rows, seed=0, iterations=args.iterations)
        return found.assignment.numpy()

    return run


def theirs(folder: Path, case: Case, args: argparse.Namespace) -> Callable[[], np.ndarray]:
    """faiss's k-means, ready to run; returns the row of each id."""
    import faiss

    faiss.omp_set_num_threads(case.threads)
    weights = np.load(folder / "weights.npy")

    def run() -> np.ndarray:
        vectors = np.load(folder / "vectors.npy")
        # No sampling: ours sees every id as well.
        means = faiss.Kmeans(
            case.dim, case.rows, niter=args.iterations, seed=0, min_points_per_centroid=1,
            max_points_per_centroid=len(weights),
        )  # fmt: skip
        means.train(vectors, weights=weights)
        return means.index.search(vectors, 1)[1][:, 0]

    return run


ENGINES = {"recpress": ours, "faiss": theirs}


def measured(engine: str, folder: Path, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """One run in this process."""
    run = ENGINES[engine](folder, case, args)
    with Peak() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        row_of = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "CPU seconds": cpu_seconds,
        "peak MB": peak.bytes / 1e6,
        "distortion": distortion(folder, row_of.astype(np.int64), case.rows),
        "rows used": int((np.bincount(row_of, minlength=case.rows) > 0).sum()),
    }


def distortion(folder: Path, rows: np.ndarray, number: int) -> float:
    """sum_i w_i |v_i|^2 - sum_rows |sum of w v|^2 / sum of w, a column at a time."""
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    weights = np.load(folder / "weights.npy").astype(np.float64)
    mass = np.bincount(rows, weights, number).clip(1e-300)
    total = 0.0
    for column in range(vectors.shape[1]):
        values = vectors[:, column].astype(np.float64)
        sums = np.bincount(rows, weights * values, number)
        total += float((weights * (values - (sums / mass)[rows]) ** 2).sum())
    return total


def cases(args: argparse.Namespace) -> list[Case]:
    """The first value of each option is the base; the others are varied one at a time."""
    base = {"ids": args.ids[0], "dim": args.dims[0], "threads": args.threads[0]}
    varied = {"ids": args.ids, "dim": args.dims, "threads": args.threads}
    points = [base, *(base | {name: value} for name, values in varied.items() for value in values[1:])]
    return [Case(**point, rows=max(1, round(point["ids"] * args.share))) for point in points]


def compare(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table of one case: medians of runs that took turns."""
    engines, note = ["recpress"], ""
    head: dict[str, Any] = {"ids": case.ids, "rows": case.rows, "dim": case.dim, "threads": case.threads}
    if case.ids > args.most_faiss:
        note = f"not run above {args.most_faiss:,} ids"
    elif not installed("faiss"):
        note = MISSING
    else:
        engines.append("faiss")
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        make(folder, case.ids, case.dim)
        for _ in range(args.runs):
            for engine in engines:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    found[engine].append(pool.submit(measured, engine, folder, case, args).result())
                words = f"{case.ids:,} ids x {case.dim}, {engine}, threads {case.threads}"
                print(f"{words}: {found[engine][-1]['seconds']:.1f} s", flush=True)
    table: list[dict[str, Any]] = []
    for engine, runs in found.items():
        row = head | {"engine": engine}
        row |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row["ids/s"] = case.ids * args.iterations / row["seconds"]
        for word, key in (
            ("time", "seconds"), ("CPU time", "CPU seconds"), ("memory", "peak MB"), ("distortion", "distortion")
        ):  # fmt: skip
            if "faiss" in found:
                pairs = zip(runs, found["faiss"], strict=True)
                ratios = [a[key] / b[key] for a, b in pairs if b[key] > 0]  # so small a peak may not be seen
                row[f"{word} / faiss"] = statistics.median(ratios) if ratios else None
        table.append(row)
    return [*table, head | {"engine": "faiss", "note": note}] if note else table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ids", type=int, nargs="+", default=[200_000, 50_000, 1_000_000, 10_000_000])
    parser.add_argument("--share", type=float, default=0.1, help="rows, as a share of the ids")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="of an id's vector")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of both libraries")
    parser.add_argument("--runs", type=int, default=1, help="of each engine, taking turns")
    parser.add_argument("--most-faiss", type=int, default=200_000, help="most ids with which faiss is run")
    parser.add_argument("--folder", help="where the made data lie for the time of the run")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin, on cores that others use, take minutes
    todo = cases(args)
    publish(
        "Making a map: seconds, memory and distortion, compared with faiss's k-means",
        [row for case in todo for row in compare(case, args)],
        out=args.out,
        settings=settings_of(vars(args), leave_out=("out", "folder")),
        plots=[
            lines(["ids", "dim", "threads"], ["ids/s", "peak MB"], ["engine"], title="A tenth of the ids as rows",
                  at={"ids": todo[0].ids, "dim": todo[0].dim, "threads": todo[0].threads}),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
