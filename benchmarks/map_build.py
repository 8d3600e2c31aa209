"""The clustering behind `learned` and `cluster`: time, peak memory and distortion; and against faiss's k-means.

    python benchmarks/map_build.py --faiss                             # 200,000 ids to 20,000 rows, both
    python benchmarks/map_build.py --ids 10000000 --rows 1000000       # ours alone

Made data: ids in a mixture of Gaussians, written to a temporary file and read by memory map; an id's count falls off
as a power of its rank, and its weight is the root of its count. Each run is a process of its own, and ours and
faiss's take turns. Both get the same weights, iterations and threads. Distortion is sum_i w_i |v_i - c_row(i)|^2 with
each row the weighted mean of its ids, computed here for both, in float64. Memory is the peak above what the process
held before the clustering, without the memory map's pages, which the system takes back where it needs them (Linux
only); faiss wants the whole matrix in memory, which is counted. `threads` are those of both libraries. On a
CPU that others use too, CPU seconds say more than seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

BLOCK = 1 << 19
"""Ids that are made at a time."""


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
    """Highest resident memory without file pages (RssAnon) above that at the start, read 20 times a second."""

    def __enter__(self) -> Peak:
        self._start = self.bytes = _anonymous()
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
            self.bytes = max(self.bytes, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def ours(folder: Path, args: argparse.Namespace) -> Callable[[], np.ndarray]:
    """A clustering that is ready to run; returns the row of each id."""
    import torch
    from recpress.modules.hashing.clustering import cluster

    torch.set_num_threads(args.threads)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    weights = torch.from_numpy(np.load(folder / "weights.npy"))
    shown = [time.perf_counter()]

    def progress(stage: str, done: int, total: int) -> None:
        if args.progress and time.perf_counter() - shown[0] > 20:
            shown[0] = time.perf_counter()
            print(f"{time.strftime('%H:%M:%S')} {stage}: {done:,} of {total:,} ids", flush=True)

    def run() -> np.ndarray:
        found = cluster(vectors, weights, args.rows, seed=0, iterations=args.iterations, progress=progress)
        return found.assignment.numpy()

    return run


def theirs(folder: Path, args: argparse.Namespace) -> Callable[[], np.ndarray]:
    """faiss's k-means, ready to run; returns the row of each id."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    weights = np.load(folder / "weights.npy")

    def run() -> np.ndarray:
        vectors = np.load(folder / "vectors.npy")
        # No sampling: ours sees every id as well.
        means = faiss.Kmeans(
            args.dim, args.rows, niter=args.iterations, seed=0, min_points_per_centroid=1,
            max_points_per_centroid=args.ids,
        )  # fmt: skip
        means.train(vectors, weights=weights)
        return means.index.search(vectors, 1)[1][:, 0]

    return run


ENGINES = {"recpress": ours, "faiss": theirs}


def measured(engine: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One run in this process."""
    run = ENGINES[engine](folder, args)
    with Peak() as peak:
        start, cpu = time.perf_counter(), time.process_time()
        rows = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak.bytes / 1e6,
        "distortion": distortion(folder, rows.astype(np.int64), args.rows),
        "rows_used": int((np.bincount(rows, minlength=args.rows) > 0).sum()),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="of each engine, taking turns")
    parser.add_argument("--faiss", action="store_true", help="compare with faiss (pip install faiss-cpu)")
    parser.add_argument("--progress", action="store_true", help="a line now and then")
    parser.add_argument("--folder", help="where the made data lie for the time of the run")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    engines = ["recpress", *(["faiss"] if args.faiss else [])]
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        make(folder, args.ids, args.dim)
        for _ in range(args.runs):
            for engine in engines:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    found[engine].append(pool.submit(measured, engine, folder, args).result())
    middle = {
        engine: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for engine, runs in found.items()
    }
    result = {
        **{k: v for k, v in vars(args).items() if k not in ("out", "folder", "progress", "faiss")},
        "cpus": os.cpu_count(),
        "engines": middle,
    }
    if args.faiss:
        pairs = list(zip(found["recpress"], found["faiss"], strict=True))
        result["ratio_to_faiss"] = {
            key: round(statistics.median(a[key] / b[key] for a, b in pairs), 4)
            for key in ("seconds", "cpu_seconds", "peak_mb", "distortion")
        }
    print(f"{'':10} {'seconds':>10} {'CPU s':>10} {'peak MB':>10} {'distortion':>14} {'rows used':>10}")
    for engine, run in middle.items():
        print(
            f"{engine:10} {run['seconds']:10.1f} {run['cpu_seconds']:10.1f} {run['peak_mb']:10.0f} "
            f"{run['distortion']:14.6g} {run['rows_used']:10.0f}"
        )
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
