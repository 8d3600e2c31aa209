"""Is `recpress recommend` as fast as exact search of faiss and implicit, and does it respect its memory statement?

Takes 20 s small, 15 minutes full, alone on two cores.

    python benchmarks/recommend.py --users 1000000 --peer-users 100000 --rounds 1

The same random vectors for all. `recpress recommend` is the whole command: it opens the log, reads seen items, omits
them, and writes Parquet. faiss (IndexFlatIP) and implicit (with its filter of seen items) have all arrays in memory
before, and return arrays. Every run is a process of its own, in alternating order; ratios are of time per user.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recpress.benchmarks.common import MISSING, arguments, bars, installed, publish, settings_of
from recpress.benchmarks.measure import Cost, alone, cost, in_turns, ratio
from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.modules.als.factors import Factors
from recpress.trainer.artifacts.factors import FACTORS, describe_log
from recpress.trainer.recommend.config import RecommendConfig
from recpress.trainer.recommend.stage import recommend

SMALL = ("--users", "4000", "--items", "5000", "--k", "20", "--rounds", "1")
FULL = ("--users", "1000000", "--peer-users", "100000", "--rounds", "1")

BATCH = 8192
"""Users per call of a peer."""


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    sizes = {"users": 50_000, "items": 100_000, "dim": 64, "k": 100, "seen": 20, "threads": 2, "rounds": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer-users", type=int, help="users of the peers; default: all")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(args, Path(folder))
    publish(
        f"The best {args.k} items of {args.users:,} users among {args.items:,}, {args.dim} dimensions, exact",
        rows,
        out=args.out,
        settings=settings_of(vars(args)),
        plots=[bars(["users/s"], ["program"], title="Exact top-K of all users")],
    )


def measured(args: Any, folder: Path) -> list[dict[str, Any]]:
    """A row per program."""
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, args.dim)).astype(np.float32) for n in (args.users, args.items))
    seen = np.repeat(np.arange(args.users), args.seen), rng.integers(0, args.items, args.users * args.seen)
    seen[0][-1], seen[1][-1] = args.users - 1, args.items - 1  # the log has all ids
    write_inputs(folder, users, items, seen)
    stated: list[int] = []
    count = min(args.peer_users or args.users, args.users)
    some, seen_of_some = users[:count], tuple(column[: count * args.seen] for column in seen)

    def of_recpress() -> Cost:
        found, memory = alone(run_recpress, folder, args)
        stated.append(memory)
        return found

    runs: dict[str, Callable[[], Cost]] = {"recpress recommend": of_recpress}
    if installed("faiss"):
        runs["faiss"] = lambda: alone(run_faiss, some, items, args)
    if installed("implicit"):
        runs["implicit"] = lambda: alone(run_implicit, some, items, seen_of_some, args)
    found = in_turns(runs, args.rounds)
    ours = found["recpress recommend"]
    rows: list[dict[str, Any]] = []
    for name in ("recpress recommend", "faiss", "implicit"):
        if name not in found:
            rows.append({"program": name, "note": MISSING})
            continue
        median = sorted(found[name], key=lambda one: one.wall)[len(found[name]) // 2]
        row = {
            "program": name,
            "users": int(median.done),
            "users/s": median.done / median.wall,
            "s": median.wall,
            "CPU s": median.cpu,
        }
        row |= {"time / recpress": ratio(found[name], ours, "wall"), "CPU / recpress": ratio(found[name], ours, "cpu")}
        row |= {"peak MB": max(one.peak for one in found[name]) / 1e6}
        if name not in ("faiss", "implicit"):
            row["stated MB"] = max(stated) / 1e6
        rows.append(row)
    return rows


def write_inputs(folder: Path, users: np.ndarray, items: np.ndarray, seen: tuple[np.ndarray, np.ndarray]) -> None:
    """A log of dense ids, and factors of it."""
    (folder / "log").mkdir()
    table = pa.table({"user_id": seen[0], "item_id": seen[1]})
    pq.write_table(table, folder / "log" / "train.parquet", row_group_size=1 << 20)
    log = open_log(folder / "log")
    meta = {"log": describe_log(log), "dim": users.shape[1], "crossfit": None, "config": {}}
    with artifact.writing(folder / "factors", FACTORS, meta) as temporary:
        Factors(torch.from_numpy(users), torch.from_numpy(items), len(users), len(items)).save(temporary)


def run_recpress(folder: Path, args: Any) -> tuple[Cost, int]:
    """(cost, bytes of memory that the command stated)."""
    torch.set_num_threads(args.threads)
    config = RecommendConfig(model=str(folder / "factors"), out=str(folder / "best"), k=args.k, overwrite=True)
    stated: list[int] = []

    def work() -> float:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            stated.append(recommend(config)["memory"])
        return float(args.users)

    return cost(work), stated[0]


def run_faiss(users: np.ndarray, items: np.ndarray, args: Any) -> Cost:
    """IndexFlatIP: seen items are not omitted."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    index = faiss.IndexFlatIP(args.dim)
    index.add(items)

    def work() -> float:
        for first in range(0, len(users), BATCH):
            index.search(users[first : first + BATCH], args.k)
        return float(len(users))

    return cost(work)


def run_implicit(users: np.ndarray, items: np.ndarray, seen: tuple[np.ndarray, np.ndarray], args: Any) -> Cost:
    """`recommend` of a factorization with these factors, seen items omitted."""
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    pairs = csr_matrix((np.ones(len(seen[0]), np.float32), seen), shape=(len(users), len(items)))
    model = AlternatingLeastSquares(factors=args.dim, num_threads=args.threads)
    model.user_factors, model.item_factors = users, items

    def work() -> float:
        for first in range(0, len(users), BATCH):
            chosen = np.arange(first, min(first + BATCH, len(users)))
            model.recommend(chosen, pairs[chosen], N=args.k, filter_already_liked_items=True)
        return float(len(users))

    return cost(work)


if __name__ == "__main__":
    main()
