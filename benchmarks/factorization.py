"""`als` against the library `implicit` on CPU: same log, factors, sweeps, threads and objective.

    python benchmarks/factorization.py --data ml-1m=.../train.parquet gowalla=.../interactions.parquet
    python benchmarks/factorization.py --made 20000 5000 1000000

Each run is a process of its own; ours and theirs take turns. Ours is timed from arrays of ids (both CSRs are
built within the time), theirs from a CSR that is ready. The objective is computed here for both, in float64:

    sum_all s^2 + sum_interactions [(1 + confidence) (1 - s)^2 - s^2] + regularization (|X|^2 + |Y|^2) ,

which is what implicit calls alpha = 1 + confidence. Memory is the peak above what the process held with the
log loaded (Linux only), against its target: the log twice as CSR (int32 ids, float32 values, int64 offsets)
and the factors.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

Log = tuple[np.ndarray, np.ndarray]
ENGINES = ("recpress", "implicit")


def load(source: str, made: list[int] | None) -> Log:
    """Distinct (user, item) pairs of a Parquet file (its `train` part where it has a split), or made ones."""
    if made:
        num_users, num_items, rows = made
        rng = np.random.default_rng(0)
        users = (num_users * rng.random(rows) ** 1.5).astype(np.int64)
        items = (num_items * rng.random(rows) ** 2.5).astype(np.int64)
    else:
        import pyarrow.parquet as pq

        split = [("split", "=", "train")] if "split" in pq.read_schema(source).names else None
        table = pq.read_table(source, columns=["user_id", "item_id"], filters=split)
        users, items = table["user_id"].to_numpy(), table["item_id"].to_numpy()
    keys = np.unique(users.astype(np.int64) << 32 | items)
    order = np.random.default_rng(0).permutation(len(keys))
    return (keys[order] >> 32).astype(np.int32), (keys[order] & 0xFFFFFFFF).astype(np.int32)


def ours(log: Log, args: argparse.Namespace, factors: int, sweeps: int) -> Callable[[], tuple]:
    """A fit of `als` that is ready to run."""
    import torch
    from recpress.modules.als import ALS
    from recpress.modules.config import ALSConfig

    torch.set_num_threads(args.threads)
    config = ALSConfig(
        factors=factors, sweeps=sweeps, confidence=args.confidence, regularization=args.regularization,
        solver=args.solver,
    )  # fmt: skip

    def fit() -> tuple:
        als = ALS(config, int(log[0].max()) + 1, int(log[1].max()) + 1)
        als.add(*log)
        found = als.fit()
        return found.users.numpy(), found.items.numpy()

    return fit


def theirs(log: Log, args: argparse.Namespace, factors: int, sweeps: int) -> Callable[[], tuple]:
    """A fit of `implicit` that is ready to run."""
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(log[0]), np.float32), log))

    def fit() -> tuple:
        model = AlternatingLeastSquares(
            factors=factors, iterations=sweeps, num_threads=args.threads, random_state=0,
            alpha=1 + args.confidence, regularization=args.regularization,
        )  # fmt: skip
        model.fit(matrix, show_progress=False)
        return model.user_factors, model.item_factors

    return fit


def objective(log: Log, users: np.ndarray, items: np.ndarray, args: argparse.Namespace) -> float:
    """In float64, without all pairs: sum_all s^2 = trace(X'X Y'Y)."""
    x, y = users.astype(np.float64), items.astype(np.float64)
    total = ((x.T @ x) * (y.T @ y)).sum() + args.regularization * ((x * x).sum() + (y * y).sum())
    for first in range(0, len(log[0]), 1 << 16):
        part = slice(first, first + (1 << 16))
        s = np.einsum("nd,nd->n", x[log[0][part]], y[log[1][part]])
        total += (args.confidence * (1 - s) ** 2 + 1 - 2 * s).sum()
    return float(total)


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def measure(engine: str, source: str, args: argparse.Namespace, factors: int) -> dict[str, float]:
    """One timed run in this process."""
    log, make = load(source, args.made), {"recpress": ours, "implicit": theirs}[engine]
    small = np.arange(64, dtype=np.int32)
    make((small, small), args, factors, 1)()  # imports, thread pools, generated kernels
    fit = make(log, args, factors, args.sweeps)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what loading freed would hide what the fit takes
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")  # the peak starts from here
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    users, items = fit()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    used = memory("VmHWM") - before
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_bytes": used,
        "objective": objective(log, users, items, args),
    }


def compare(name: str, source: str, args: argparse.Namespace, factors: int) -> dict:
    """Medians of runs that take turns."""
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.runs):
        for engine in ENGINES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                runs[engine].append(pool.submit(measure, engine, source, args, factors).result())
    log = load(source, args.made)
    num_users, num_items = int(log[0].max()) + 1, int(log[1].max()) + 1
    csr = 8 * len(log[0]) + 8 * (num_users + 1)
    row: dict = {
        "data": name,
        "factors": factors,
        "rows": len(log[0]),
        "users": num_users,
        "items": num_items,
    }
    row["memory_target_bytes"] = 2 * csr + 4 * factors * (num_users + num_items)
    for engine in ENGINES:
        row[engine] = {key: statistics.median(run[key] for run in runs[engine]) for key in runs[engine][0]}
    for key in ("seconds", "cpu_seconds"):
        row[f"{key}_ratio"] = statistics.median(
            a[key] / b[key] for a, b in zip(runs["recpress"], runs["implicit"], strict=True)
        )
    row["runs"] = runs
    return row


HEAD = (
    "data",
    "factors",
    "ours s",
    "implicit s",
    "ratio",
    "CPU ratio",
    "objective",
    "implicit's",
    "MB",
    "implicit's",
    "target",
)


def line(row: dict) -> tuple:
    """Cells of one row of the table."""
    a, b = row["recpress"], row["implicit"]
    return (
        row["data"], row["factors"], f"{a['seconds']:.2f}", f"{b['seconds']:.2f}",
        f"{row['seconds_ratio']:.2f}", f"{row['cpu_seconds_ratio']:.2f}",
        f"{a['objective']:.0f}", f"{b['objective']:.0f}",
        f"{a['peak_bytes'] / 1e6:.0f}", f"{b['peak_bytes'] / 1e6:.0f}",
        f"{row['memory_target_bytes'] / 1e6:.0f}",
    )  # fmt: skip


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PARQUET", help="logs to measure on")
    parser.add_argument("--made", nargs=3, type=int, metavar=("USERS", "ITEMS", "ROWS"), help="a random log instead")
    parser.add_argument("--factors", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--sweeps", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--confidence", type=float, default=3.0)
    parser.add_argument("--regularization", type=float, default=10.0)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    if bool(args.data) == bool(args.made) or not all("=" in data for data in args.data):
        parser.error("expected --data NAME=PARQUET ... or --made USERS ITEMS ROWS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as implicit asks for; it runs threads of its own
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = []
    print(" | ".join(HEAD), flush=True)
    for data in args.data or ["made=made"]:
        name, source = data.split("=", 1)
        for factors in args.factors:
            rows.append(compare(name, source, args, factors))
            print(" | ".join(map(str, line(rows[-1]))), flush=True)
    if args.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps(
                {"settings": settings | {"data": [d.split("=")[0] for d in args.data]}, "rows": rows},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
