"""How fast is a training step, and in how much memory? Our loop, a bare TorchRec loop, and nn.EmbeddingBag under DDP.

Takes 45 s small, 7 minutes full, alone on two cores.

    python benchmarks/training.py --out training.json          # or under torchrun, on its processes

The same network, on the same batches, which are in memory; tables that are trained, frozen in 32 or 8 bits, or hashed
(a map of ids to fewer rows, which are trained). The loops:

- `recpress`: `trainer.loop.fit`, with its pipeline, losses read, log lines;
- `bare TorchRec`: zero_grad, forward, backward, step of the same DistributedModelParallel model;
- `DDP, dense` and `DDP, sparse`: plain PyTorch, with replicated tables (`plain_torch.py`), gradients of all rows or of
  the rows of a batch. Frozen tables have none, and 8-bit ones no counterpart there.

The first value of each option is the base, on which all kinds of tables run in all loops, on each number of ranks,
`--runs` times. Table rows, dimension and batch are then varied one at a time, `--axis-runs` times each: all tables in
our loop, and trained tables in the others; so is the share of rows, of hashed tables in our loop. For the sample rates
our stream reads the batches from a log of `--log-rows` rows on disk: `seconds an epoch` is the time of one pass over
the sample, reading included, and the stream's memory counts.

Each rank of a case has its own process, so that memory freed by one case does not hide that of the next. Memory is the
peak of the heaviest rank above that with the batches loaded (on a GPU: allocated by torch). `recpress / this` are
medians of the ratios of rows/s of runs that took turns; `CPU`: rows per second of CPU time of all ranks, which does not
depend on other processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recpress.benchmarks.common import arguments, lines, publish, settings_of
from recpress.benchmarks.loops import BARE, LOOPS, OURS, Case, LogBatches, Subject, make_log, random_batch
from recpress.benchmarks.processes import PeakMemory, in_own_processes, launched
from recpress.modules.row_source import round_up
from recpress.trainer.distributed.process_group import process_group

SMALL = (
    "--table-rows", "50000", "200000", "--dims", "32", "--batches", "1024", "--shares", "0.2", "--rates", "0.1", "1",
    "--log-rows", "20000", "--rows", "4096", "--runs", "1",
)  # fmt: skip
RANKS = True

WARM_UP = 2
FEWEST = 4
"""Steps of a run at least."""
SAMPLED = {"trained": (OURS, BARE), "frozen fp32": (OURS,)}
"""Tables for which the sample rate is varied, and in which loops."""


def cases(args: argparse.Namespace) -> dict[Case, int]:
    """Each with the number of its runs; those of one point follow each other, so that their loops take turns."""
    base = {"table_rows": args.table_rows[0], "dim": args.dims[0], "batch": args.batches[0], "ranks": args.ranks[0]}
    found: dict[Case, int] = {}

    def add(tables: str, loop: str, runs: int, **varied: Any) -> None:
        share = args.shares[0] if tables == "hashed" else 1.0
        values = {"share": share, "negatives": args.negatives} | base | varied
        found.setdefault(Case(tables=tables, loop=loop, **values), runs)

    for ranks in args.ranks:
        for tables in args.tables:
            for loop in LOOPS[tables]:
                add(tables, loop, args.runs, ranks=ranks)
    for name, values in (("table_rows", args.table_rows), ("dim", args.dims), ("batch", args.batches)):
        for value in values[1:]:
            for tables in args.tables:
                for loop in LOOPS[tables] if tables == "trained" else (OURS,):
                    add(tables, loop, args.axis_runs, **{name: value})
    for share in args.shares[1:] if "hashed" in args.tables else ():
        add("hashed", OURS, args.axis_runs, share=share)
    for rate in args.rates:
        for tables in args.tables:
            for loop in SAMPLED.get(tables, ()):
                add(tables, loop, args.axis_runs, rate=rate)
    return found


def measured(case: Case, log: str, args: argparse.Namespace) -> dict[str, float]:
    """One run, on each rank of a case: all of them return the figures of all."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    with process_group(args.device) as ranks:
        steps = WARM_UP if case.rate else max(FEWEST, args.rows // case.batch)
        batches = [random_batch(case, 1000 * ranks.rank + i, ranks.device) for i in range(steps)]
        cuda = ranks.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        memory = PeakMemory()
        source = LogBatches(log, case, ranks.rank, ranks.device) if case.rate else batches
        rows = source.rows if isinstance(source, LogBatches) else ranks.world_size * steps * case.batch
        subject = Subject(case, tuple(args.hidden), ranks.device)
        subject.train(batches[:WARM_UP])
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        subject.train(source)
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated() - before if cuda else memory.bytes
        subject.close()
        found: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(found, (wall, cpu, peak))
    longest = max(wall for wall, _, _ in found)
    figures = {
        "rows/s": rows / longest,
        "rows/CPU s": rows / sum(cpu for _, cpu, _ in found),
        "peak MB": max(peak for _, _, peak in found) / 1e6,
    }
    return figures | ({"seconds an epoch": longest} if case.rate else {})


def show(case: Case, found: dict[str, float]) -> None:
    """A line a run, for who waits."""
    if os.environ.get("RANK", "0") == "0":
        varied = f"{case.table_rows:,} x {case.dim}, batch {case.batch:,}, ranks {case.ranks}, share {case.share:g}"
        rate = f", sample rate {case.rate:g}" if case.rate else ""
        print(f"{case.tables}, {case.loop}, {varied}{rate}: {found['rows/s']:,.0f} rows/s", flush=True)


def table(runs: dict[Case, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians, and what ours has of them, over runs that took turns."""
    rows = []
    for case, found in runs.items():
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
            "sample rate": case.rate,
            "runs": len(found),
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
    memory = {"sample rate": [None]}
    share = {"share of rows": [1.0, args.shares[0]]}
    measures = ["rows/s", "peak MB"]
    ours = {"loop": [OURS]}
    return [
        lines([*base], measures, ["tables"], at=base, only=ours | memory | share, title="Our loop"),
        lines([*base], measures, ["loop"], at=base, only={"tables": ["trained"]} | memory, title="Trained tables"),
        lines(["compression"], measures, ["loop"], at=base, only=ours | memory, title="All tables in our loop"),
        lines(["sample rate"], ["seconds an epoch", *measures], ["tables", "loop"], at=base, title="From a log"),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--table-rows", type=int, nargs="+", default=[500_000, 125_000, 2_000_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 16, 128], help="of a row of the tables")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 1024, 16_384], help="rows of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="under torchrun, its processes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5, 0.02], help="of rows, hashed tables")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.3, 1.0], help="of the sample of a log")
    parser.add_argument("--log-rows", type=int, default=150_000, help="of the log that is sampled")
    parser.add_argument("--tables", nargs="+", choices=[*LOOPS], default=[*LOOPS])
    parser.add_argument("--hidden", type=int, nargs="*", default=[256])
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--rows", type=int, default=24_576, help="that a rank trains on in one run, 4 batches at least")
    parser.add_argument("--runs", type=int, default=3, help="of each case at the base, taking turns")
    parser.add_argument("--axis-runs", type=int, default=1, help="of each other case")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    if launched() > 1:
        args.ranks = [launched()]
    todo = cases(args)
    runs: dict[Case, list[dict[str, float]]] = {case: [] for case in todo}
    with tempfile.TemporaryDirectory() as folder:
        if args.rates:
            make_log(Path(folder) / "log", next(iter(todo)), args.log_rows)
        for number in range(max(todo.values())):
            for case in (case for case, times in todo.items() if number < times):
                runs[case].append(in_own_processes(measured, case.ranks, case, f"{folder}/log", args)[0])
                show(case, runs[case][-1])
    if os.environ.get("RANK", "0") != "0":
        return
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    publish(
        "Training: rows a second and peak memory of a rank",
        table(runs),
        out=args.out,
        settings=settings_of(vars(args)) | {"first case": asdict(next(iter(todo)))},
        device=device,
        plots=plots(args),
    )


if __name__ == "__main__":
    main()
