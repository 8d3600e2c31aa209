"""How fast is a training step, and in how much memory? Our loop, a bare TorchRec loop, and nn.EmbeddingBag under DDP.

    python benchmarks/training.py --out training.json          # or under torchrun, on its processes

The same network, on the same batches, which are in memory already; tables that are trained, that are frozen in 32 or
8 bits, and that are hashed (a map of ids to fewer rows, which are trained). The loops:

- `recpress`: `trainer.loop.fit`, with its pipeline, losses read, log lines;
- `bare TorchRec`: zero_grad, forward, backward, step of the same DistributedModelParallel model;
- `DDP, dense` and `DDP, sparse`: plain PyTorch, with whole tables on each rank (`plain_torch.py`), gradients of all
  rows or of a batch's rows. Frozen tables have none, and 8-bit ones no counterpart there.

The size of the tables, the length of a row, the batch, the ranks and the share of rows are varied one at a time. Each
case is a process of its own for each rank. Memory is the peak of the heaviest rank above what it held with the batches
loaded (of a GPU: what torch allocated). `recpress / this` are medians of the ratios of rows/s of runs that took turns:
`CPU` is rows a second of CPU time of all ranks, which others on the machine do not take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from recpress.benchmarks.common import lines, publish, settings_of
from recpress.benchmarks.plain_torch import PlainTwoTower
from recpress.benchmarks.processes import PeakMemory, in_own_processes, launched
from recpress.data.batch import ITEM, USER, Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.frozen import Storage, row_bytes
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.rows import round_up
from recpress.modules.two_tower import SideSpec, TwoTower
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.watch.metrics_log import MetricsLog
from torchrec import KeyedJaggedTensor

SMALL = (
    "--table-rows", "50000", "200000", "--dims", "32", "--batches", "1024", "--shares", "0.2", "--steps", "8",
    "--runs", "1",
)  # fmt: skip
RANKS = True

OURS, BARE, DENSE, SPARSE = "recpress", "bare TorchRec", "DDP, dense", "DDP, sparse"
LOOPS = {
    "trained": (OURS, BARE, DENSE, SPARSE),
    "frozen fp32": (OURS, BARE, DENSE),
    "frozen int8": (OURS, BARE),
    "hashed": (OURS, BARE, SPARSE),
}
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one loop."""

    tables: str
    loop: str
    table_rows: int
    """Ids of users and items together."""
    dim: int
    batch: int
    """Rows of a rank's batch."""
    ranks: int
    share: float
    """Rows of a hashed table, as a share of the ids; 1 for the others."""

    negatives: int
    """Of each row."""

    @property
    def items(self) -> int:
        """A fifth of the ids."""
        return self.table_rows // 5

    @property
    def users(self) -> int:
        return self.table_rows - self.items

    @property
    def sides(self) -> tuple[int, int]:
        return self.users, self.items

    @property
    def storage(self) -> Storage:
        return "int8" if self.tables == "frozen int8" else "fp32"

    @property
    def table_bytes(self) -> int:
        """Of all tables as they are stored, with the maps."""
        rows = sum(max(1, round(self.share * ids)) for ids in self.sides)
        maps = 4 * self.table_rows if self.tables == "hashed" else 0
        return rows * row_bytes(self.storage, round_up(self.dim)) + maps


def cases(args: argparse.Namespace) -> list[Case]:
    """The first value of each option is the base; the others are varied one at a time."""
    base = {"table_rows": args.table_rows[0], "dim": args.dims[0], "batch": args.batches[0], "ranks": args.ranks[0]}
    common = {"negatives": args.negatives}
    points = [base]
    for name, values in zip(base, (args.table_rows, args.dims, args.batches, args.ranks), strict=True):
        points += [base | {name: value} for value in values[1:]]
    found = []
    for point in points:
        for tables in args.tables:
            shares = args.shares if tables == "hashed" else [1.0]
            for share in shares if point is base else shares[:1]:
                found += [Case(tables=tables, loop=loop, share=share, **point, **common) for loop in LOOPS[tables]]
    return found


class MadeFactors:
    """Random rows that nobody holds: made when they are read."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (rows, dim)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        count = len(range(*rows.indices(self.shape[0]))) if isinstance(rows, slice) else len(rows)
        width = len(range(*columns.indices(self.shape[1])))
        return np.random.default_rng(0).normal(0, 0.3, (count, width)).astype(np.float32)


def made_batch(sizes: Any, seed: int, device: torch.device) -> Batch:
    """Ids fall off as 1 / rank, as those of a log do; negatives are uniform.

    Args:
        sizes: has `users`, `items`, `batch` (rows) and `negatives` (of a row).
    """
    rng = np.random.default_rng(seed)

    def skewed(num: int, count: int) -> torch.Tensor:
        return torch.from_numpy((num ** rng.random(count) - 1).astype(np.int64).clip(0, num - 1))

    negatives = torch.from_numpy(rng.integers(0, sizes.items, sizes.batch * sizes.negatives))
    users, items = skewed(sizes.users, sizes.batch), torch.cat([skewed(sizes.items, sizes.batch), negatives])
    return Batch(
        keyed(USER, users),
        keyed(ITEM, items),
        torch.ones(sizes.batch),
        torch.full((len(items),), -float(np.log(sizes.items))),
    ).to(device)


def keyed(key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([key], ids, lengths=torch.ones_like(ids, dtype=torch.int32), stride=len(ids))


def side(key: str, ids: int, case: Case) -> SideSpec:
    """Users or items, with a map where they are hashed."""
    id_map = None
    if case.tables == "hashed":
        rows = max(1, round(case.share * ids))
        drawn = np.random.default_rng(2).integers(0, rows, (ids, 1), dtype=np.int32)
        id_map = IdMap(rows=torch.from_numpy(drawn), num_rows=rows)
    return SideSpec(key=key, rows=ids, dim=case.dim if case.tables.startswith("frozen") else None, map=id_map)


class Subject:
    """The model of a case, and its loop."""

    def __init__(self, case: Case, hidden: tuple[int, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device, frozen = case, device, case.tables.startswith("frozen")
        config = TwoTowerConfig(
            tables=TablesConfig(
                strategy="init-freeze" if frozen else "random", dim=round_up(case.dim), storage=case.storage
            ),
            towers=TowersConfig(kind="residual", hidden=hidden),
            loss=LossConfig(kind="bce"),
        )
        user, item = side(USER, case.sides[0], case), side(ITEM, case.sides[1], case)
        if case.loop in (DENSE, SPARSE):
            self.plain = PlainTwoTower(
                config, user, item, OptimizerConfig(), device, frozen=frozen, sparse=case.loop == SPARSE
            )
            return
        model = TwoTower(config, user, item, tables_device="meta")
        self.model = shard(model, device, batch_size=case.batch)
        if frozen:
            self.model.module.load_factors(*(MadeFactors(ids, case.dim) for ids in case.sides))
        self.optimizer = TrainOptimizer(self.model, OptimizerConfig(), 0)

    def train(self, batches: list[Batch]) -> None:
        """One pass."""
        if self.case.loop == OURS:
            self._fit(batches)
        elif self.case.loop == BARE:
            self._bare(batches)
        else:
            self.plain.train(batches)

    def _bare(self, batches: list[Batch]) -> None:
        self.model.train()
        for batch in batches:
            self.optimizer.zero_grad()
            loss, _ = self.model(batch)
            loss.backward()
            self.optimizer.step()

    def _fit(self, batches: list[Batch]) -> None:
        with tempfile.TemporaryDirectory() as folder, MetricsLog(folder) as log:
            fit(
                self.model,
                self.optimizer,
                lambda epoch, first: batches[first:],
                FitConfig(epochs=1),
                device=self.device,
                log=log,
                show_progress=False,
            )


def measured(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """One run, on each rank of a case: all of them return the figures of all."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    with process_group(args.device) as ranks:
        batches = [made_batch(case, 1000 * ranks.rank + i, ranks.device) for i in range(args.steps)]
        cuda = ranks.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        memory = PeakMemory()
        subject = Subject(case, tuple(args.hidden), ranks.device)
        subject.train(batches[:WARM_UP])
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        subject.train(batches)
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated() - before if cuda else memory.bytes
        found: list[Any] = [None] * ranks.world
        dist.all_gather_object(found, (wall, cpu, peak))
    rows = ranks.world * args.steps * case.batch
    return {
        "rows/s": rows / max(wall for wall, _, _ in found),
        "rows/CPU s": rows / sum(cpu for _, cpu, _ in found),
        "peak MB": max(peak for _, _, peak in found) / 1e6,
    }


def table(todo: list[Case], runs: dict[Case, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians, and what ours has of them, over runs that took turns."""
    rows = []
    for case in todo:
        found = runs[case]
        ours = runs[replace(case, loop=OURS)]
        row: dict[str, Any] = {
            "tables": case.tables,
            "loop": case.loop,
            "table rows": case.table_rows,
            "embedding size": case.dim,
            "batch size": case.batch,
            "ranks": case.ranks,
            "share of rows": case.share,
            "compression": 4 * round_up(case.dim) * case.table_rows / case.table_bytes,
        }
        row |= {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, key in (("rows/s", "rows/s"), ("CPU", "rows/CPU s"), ("memory", "peak MB")):
            ratios = [a[key] / max(b[key], 1e-9) for a, b in zip(ours, found, strict=True)]
            row[f"recpress / this, {name}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def plots(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Against each thing that is varied: the kinds of tables in our loop, and the loops with trained tables."""
    base = {
        "table rows": args.table_rows[0],
        "embedding size": args.dims[0],
        "batch size": args.batches[0],
        "ranks": args.ranks[0],
    }
    share = {"share of rows": [1.0, args.shares[0]]}
    measures = ["rows/s", "peak MB"]
    return [
        lines([*base], measures, ["tables"], at=base, only={"loop": [OURS], **share}, title="Our loop"),
        lines([*base], measures, ["loop"], at=base, only={"tables": ["trained"]}, title="Trained tables"),
        lines(["compression"], measures, ["loop"], at=base, only={"loop": [OURS]}, title="All tables in our loop"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-rows", type=int, nargs="+", default=[200_000, 800_000, 1_600_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 16, 128], help="of a row of the tables")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 1024, 16_384], help="rows of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="under torchrun, its processes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5, 0.05], help="of rows, hashed tables")
    parser.add_argument("--tables", nargs="+", choices=[*LOOPS], default=[*LOOPS])
    parser.add_argument("--hidden", type=int, nargs="*", default=[256])
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of one run")
    parser.add_argument("--runs", type=int, default=3, help="of each case, taking turns")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    if launched() > 1:
        args.ranks = [launched()]
    todo = cases(args)
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in todo}
    for _ in range(args.runs):
        for case in todo:
            runs[case].append(in_own_processes(measured, case.ranks, case, args)[0])
    if os.environ.get("RANK", "0") != "0":
        return
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    publish(
        "Training: rows a second and peak memory of a rank",
        table(todo, runs),
        out=args.out,
        settings=settings_of(vars(args)) | {"first case": asdict(todo[0])},
        device=device,
        plots=plots(args),
    )


if __name__ == "__main__":
    main()
