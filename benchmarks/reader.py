"""Is the stream as fast as the decoder, and how much faster than other readers?

Takes 20 s small, 8 minutes full (estimated), alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/reader.py --out runs/reader.json

The limit is bare pyarrow: as many Python threads, one row group each, and no further work. `of bare`: seconds of bare
decoding over those of the reader. `ours is faster`: seconds of the reader over those of ours with the first number of
threads. Both are medians over rounds in which all take turns, each time in a new process. CPU time is comparable on a
busy machine. Peak memory is above that after the imports; `read`: bytes read from the file, footer included, as a share
of its size.

Among the peers, torchdata's StatefulDataLoader stands for the next choice of a TorchRec user: it is PyTorch's own
answer to resuming, and with the plain loop in it, it makes the same calls as the reader of TorchEasyRec.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recpress.benchmarks import readers, synthetic_logs
from recpress.benchmarks.common import MISSING, arguments, publish, settings_of
from recpress.benchmarks.measure import Cost, alone, cost, in_turns, ratio
from recpress.benchmarks.synthetic_logs import SyntheticLog
from recpress.data.config import SampleConfig, StreamConfig

CASES = ("narrow", "narrow-1m", "uniform", "uniform-1m", "block", "wide", "lists", "raw", "text")
LOGS = {name: name for name in CASES} | {"uniform": "narrow", "uniform-1m": "narrow-1m", "block": "narrow"}
SMALL = ("--cases", "narrow", "wide", "--rows", "500000", "--wide-rows", "50000", "--rounds", "1", "--seconds", "0.2")


@dataclass(frozen=True)
class Case:
    """A log, and how our stream reads it."""

    title: str
    made: SyntheticLog
    sample: SampleConfig | None = None


def write_log(name: str, folder: Path, args: argparse.Namespace) -> SyntheticLog:
    if name == "wide":
        return synthetic_logs.wide(folder, args.wide_rows)
    if name == "lists":
        return synthetic_logs.with_lists(folder, args.wide_rows)
    if name in ("raw", "text"):
        return synthetic_logs.narrow(folder, args.rows, raw="text" if name == "text" else "integers")
    return synthetic_logs.narrow(folder, args.rows, 1_000_000 if name == "narrow-1m" else None)


def make_case(name: str, made: SyntheticLog) -> Case:
    titles = {
        "narrow": "2 ids, our layout",
        "narrow-1m": "2 ids, pyarrow's layout",
        "wide": "26 ids, 13 floats",
        "lists": "2 ids, 1 list",
        "raw": "2 raw ids of 64 bits, hashed",
        "text": "2 raw ids of 16 letters, hashed",
    }
    if name in titles:
        return Case(titles[name], made)
    if name in ("uniform", "uniform-1m"):
        return Case(titles[LOGS[name]] + ", 10 % of the rows", made, SampleConfig(rate=0.1))
    return Case("2 ids, 10 % of the row groups", made, SampleConfig(rate=0.1, kind="block"))


def sides(case: Case, args: argparse.Namespace) -> list[readers.Peer]:
    """All that take turns: bare and ours by threads, then the peers."""
    found = []
    for threads in args.threads:
        shuffled = StreamConfig(batch_size=args.batch, num_threads=threads)
        found.append(readers.Peer(f"bare decoding, {threads}", readers.bare(case.made, threads)))
        found.append(readers.Peer(f"recpress, {threads}", readers.ours(case.made, shuffled, case.sample)))
    if args.no_peers:
        return found
    if case.sample is None:
        return found + readers.peers(case.made, args.batch, args.seconds)
    rate = case.sample.rate
    return [*found, readers.Peer("iter_batches and a mask", readers.loop(case.made, args.batch, rate=rate))]


def measured(peer: readers.Peer) -> Callable[[], Cost]:
    """Two readings in one new process: memory and bytes of the first, time of the second, when the memory that
    Arrow, torch and the stream keep is there already, as it is in all but the first seconds of a long run."""

    def inside() -> Cost:
        readers.warmed()
        first = cost(peer.read, peer.workers)
        if peer.slow:
            return first
        return replace(cost(peer.read, peer.workers), peak=first.peak, read=first.read)

    return lambda: alone(inside)


def rows_of(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The case's part of the table."""
    everyone = sides(case, args)
    runs = {peer.name: measured(peer) for peer in everyone if not peer.missing}
    found = in_turns(runs, args.rounds)
    table = []
    for peer in everyone:
        if peer.missing:
            table.append({"case": case.title, "reader": peer.name, "note": MISSING})
            continue
        costs, threads = found[peer.name], args.threads[0]
        if peer.name.startswith(("bare", "recpress")):
            threads = int(peer.name.rpartition(" ")[2])
        limit, best = found[f"bare decoding, {threads}"], found[f"recpress, {args.threads[0]}"]
        row: dict[str, Any] = {"case": case.title, "reader": peer.name}
        table.append(
            row
            | {
                "M rows/s": statistics.median(c.done / c.wall for c in costs) / 1e6,
                "M rows/CPU s": statistics.median(c.done / c.cpu for c in costs) / 1e6,
                "of bare, wall": ratio(limit, costs, "wall"),
                "of bare, CPU": ratio(limit, costs, "cpu"),
                "ours is faster, wall": ratio(costs, best, "wall"),
                "ours is faster, CPU": ratio(costs, best, "cpu"),
                "peak MB": statistics.median(c.peak for c in costs) / 1e6,
                "read %": statistics.median(100 * c.read / case.made.size for c in costs),
            }
        )
    return table


def imported() -> None:
    """Imports the peers that there are, so that no measured process has to."""
    for name in ("datasets", "torchdata.stateful_dataloader"):
        with suppress(ImportError):
            importlib.import_module(name)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the narrow logs")
    parser.add_argument("--wide-rows", type=int, default=1_000_000, help="of the wide log and of that with lists")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the peers that are slow")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/hf"
        imported()
        made: dict[str, SyntheticLog] = {}
        for name in args.cases:
            log = LOGS[name]
            if log not in made:
                made[log] = alone(write_log, log, Path(folder) / log, args)
            case = make_case(name, made[log])
            table += rows_of(case, args)
            print(f"{case.title}: done", flush=True)
    publish(
        "How near to bare decoding does the stream read, and how far from it do others?",
        table,
        out=args.out,
        settings=settings_of(vars(args)),
    )


if __name__ == "__main__":
    main()
