"""How long does `als` take, and in how much memory, compared with the library `implicit`? Same log, sweeps, objective.

Takes 15 s small, 7 minutes full, alone on two cores.

    python benchmarks/factorization.py                                        # synthetic logs of growing size
    python benchmarks/factorization.py --synthetic 256000000 --sweeps 2       # as far as the machine allows
    python benchmarks/factorization.py --data ml-1m=.../train.parquet gowalla=.../interactions.parquet

Each run has its own process for each rank; ours, on each number of `--ranks`, and theirs take turns. Ours is timed from
arrays of ids (building both CSRs included), theirs from a finished CSR; implicit has no ranks. Synthetic logs have 5
users per item and 80 rows per user, of which duplicates count once, so that the tables grow with the log. The first log
is factorized with each number of `--factors`, the others with the first. A log that would need more than half of the
memory is not run. `rows/s`: rows of the log times sweeps over seconds; `table rows`: users and items.
The objective is computed here for all, in float64:

    sum_all s^2 + sum_interactions [(1 + confidence) (1 - s)^2 - s^2] + regularization (|X|^2 + |Y|^2) ,

with implicit's alpha = 1 + confidence. Memory is the peak of the heaviest rank above that with the log loaded (Linux),
against its target for one rank: the log twice as CSR (int32 ids, float32 values, int64 offsets) and the factors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from recpress.benchmarks.common import MISSING, arguments, installed, lines, publish, settings_of
from recpress.benchmarks.processes import PeakMemory, in_own_processes

SMALL = ("--synthetic", "400000", "100000", "--factors", "32", "16", "--sweeps", "3")

Log = tuple[np.ndarray, np.ndarray]
OURS, THEIRS = "recpress", "implicit"


def load(source: str | None, rows: int) -> Log:
    """Distinct (user, item) pairs of a Parquet file (its `train` part if it has a split), or `rows` synthetic ones."""
    if source is None:
        num_users, num_items = max(64, rows // 80), max(64, rows // 400)
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


def ours(log: Log, sizes: list[int], args: argparse.Namespace, factors: int, sweeps: int) -> Callable[[], tuple]:
    """A fit of `als` that is ready to run, of the part of the log that this rank has."""
    import torch
    import torch.distributed as dist

    from recpress.modules.als.factorization import ALS
    from recpress.modules.config import ALSConfig

    torch.set_num_threads(max(1, args.threads // dist.get_world_size()))
    config = ALSConfig(factors=factors, sweeps=sweeps, confidence=args.confidence, regularization=args.regularization)

    def fit() -> tuple:
        als = ALS(config, *sizes)
        als.add(*log)
        found = als.fit()
        return found.users.numpy(), found.items.numpy()

    return fit


def theirs(log: Log, sizes: list[int], args: argparse.Namespace, factors: int, sweeps: int) -> Callable[[], tuple]:
    """A fit of `implicit` that is ready to run."""
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(log[0]), np.float32), log), shape=sizes)

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

    def of_rows(first: int) -> float:
        part = slice(first, first + (1 << 16))
        s = np.einsum("nd,nd->n", x[log[0][part]], y[log[1][part]])
        return (args.confidence * (1 - s) ** 2 + 1 - 2 * s).sum()

    with ThreadPoolExecutor(args.threads) as pool:
        return float(total + sum(pool.map(of_rows, range(0, len(log[0]), 1 << 16))))


def needed_bytes(rows: int, factors: int) -> int:
    """Of the log as arrays and twice as CSR, and of the factors, of all processes of a run together."""
    users, items = rows // 80, rows // 400
    return 3 * 8 * rows + 8 * (users + items) + 4 * factors * (users + items)


def fit_of(engine: str, log: Log, sizes: list[int], args: argparse.Namespace, factors: int) -> Callable[[], tuple]:
    """A fit that is ready to run, in a process in which one has run."""
    make = {OURS: ours, THEIRS: theirs}[engine]
    small = np.arange(64, dtype=np.int32)
    make((small, small), [64, 64], args, factors, 1)()  # imports, thread pools, generated kernels
    return make(log, sizes, args, factors, args.sweeps)


def measured(engine: str, folder: str, sizes: list[int], args: argparse.Namespace, factors: int) -> dict[str, float]:
    """One timed run on each rank; rank 0 has the figures of all."""
    import torch.distributed as dist

    from recpress.trainer.distributed.process_group import process_group

    with process_group("cpu") as place:
        users, items = (np.load(f"{folder}/{name}.npy") for name in ("users", "items"))
        log = users[place.rank :: place.world_size], items[place.rank :: place.world_size]
        fit = fit_of(engine, log, sizes, args, factors)
        dist.barrier()
        memory, wall, cpu = PeakMemory(), time.perf_counter(), time.process_time()
        found = fit()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        parts: list[Any] = [None] * place.world_size
        dist.gather_object((wall, cpu, memory.bytes, *found), parts if place.rank == 0 else None)
    if place.rank:
        return {}
    x, y = (np.concatenate([part[side] for part in parts]) for side in (3, 4))
    return {
        "seconds": max(part[0] for part in parts),
        "CPU seconds": sum(part[1] for part in parts),
        "peak MB": max(part[2] for part in parts) / 1e6,
        "objective": objective((users, items), x, y, args),
    }


def compare(
    name: str, source: str | None, rows: int, widths: list[int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the table of one log, with each number of factors of `widths`: medians of runs that take turns."""
    with tempfile.TemporaryDirectory() as folder:
        log = load(source, rows)
        sizes = [int(ids.max()) + 1 for ids in log]
        np.save(f"{folder}/users.npy", log[0])
        np.save(f"{folder}/items.npy", log[1])
        number = len(log[0])
        del log
        return [row for factors in widths for row in of_factors(name, folder, number, sizes, args, factors)]


def of_factors(
    name: str, folder: str, number: int, sizes: list[int], args: argparse.Namespace, factors: int
) -> list[dict[str, Any]]:
    """Ours on each number of ranks, and implicit's."""
    engines = [(OURS, ranks) for ranks in args.ranks]
    if installed("implicit"):
        engines.append((THEIRS, 1))
    runs: dict[tuple[str, int], list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in range(args.runs):
        for engine, ranks in engines:
            figures = in_own_processes(measured, ranks, engine, folder, sizes, args, factors)[0]
            runs[engine, ranks].append(figures)
            words = f"{name}, {number:,} rows, {factors} factors, {engine}, ranks {ranks}"
            print(f"{words}: {figures['seconds']:.1f} s", flush=True)
    target = 2 * (8 * number + 8 * (sizes[0] + 1)) + 4 * factors * sum(sizes)
    head = {"data": name, "rows": number, "users": sizes[0], "items": sizes[1], "table rows": sum(sizes)}
    head |= {"factors": factors}
    rows: list[dict[str, Any]] = []
    for (engine, ranks), found in runs.items():
        row: dict[str, Any] = head | {"engine": engine, "ranks": ranks}
        row |= {key: statistics.median(run[key] for run in found) for key in found[0]}
        row["rows/s"] = number * args.sweeps / row["seconds"]
        row["target MB"] = target / 1e6
        for word, key in (("time", "seconds"), ("CPU time", "CPU seconds"), ("memory", "peak MB")):
            if theirs_ := runs.get((THEIRS, 1)):
                pairs = zip(found, theirs_, strict=True)
                row[f"{word} / implicit"] = statistics.median(a[key] / max(b[key], 1e-9) for a, b in pairs)
        rows.append(row)
    return rows if installed("implicit") else [*rows, head | {"engine": THEIRS, "note": MISSING}]


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PARQUET", help="logs to measure on")
    parser.add_argument(
        "--synthetic", nargs="*", type=int, default=[4_000_000, 1_000_000, 16_000_000, 48_000_000], metavar="ROWS",
        help="synthetic logs of so many rows, without --data; the first is the base",
    )  # fmt: skip
    parser.add_argument("--factors", nargs="+", type=int, default=[64, 32, 128], help="the first is the base")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="of ours; the threads are shared")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--confidence", type=float, default=3.0)
    parser.add_argument("--regularization", type=float, default=10.0)
    args = parser.parse_args()
    if not all("=" in data for data in args.data):
        parser.error("expected --data NAME=PARQUET ...")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as implicit asks for; it runs threads of its own
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows: list[dict[str, Any]] = []
    for data in args.data:
        name, _, source = data.partition("=")
        rows += compare(name, source, 0, args.factors, args)
    for size in [] if args.data else args.synthetic:
        widths = args.factors if size == args.synthetic[0] else args.factors[:1]
        needs = needed_bytes(size, max(widths))
        if needs > memory / 2:
            note = f"not run: needs {needs / 1e9:.1f} GB, more than half of {memory / 1e9:.1f} GB"
            rows.append({"data": "synthetic", "rows": size, "note": note})
        else:
            rows += compare("synthetic", None, size, widths, args)
    settings = settings_of(vars(args), leave_out=("out", "data"))
    publish(
        "Factorization: seconds and memory, compared with implicit",
        rows,
        out=args.out,
        settings=settings | {"data": [data.partition("=")[0] for data in args.data]},
        plots=[
            lines(["table rows", "factors"], ["rows/s", "peak MB"], ["engine", "ranks"], title="Synthetic logs",
                  at={"table rows": rows[0].get("table rows"), "factors": args.factors[0]},
                  only={"data": ["synthetic"]}),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
