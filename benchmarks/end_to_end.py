"""How long to the same quality, and in how much memory, with and without each of the two savings?

Takes 20 s small, 6 minutes full, alone on two cores.

    python benchmarks/end_to_end.py                         # on a synthetic log
    python benchmarks/end_to_end.py --data LOG              # with held-out rows

The peer is the usual network: random tables, one row per id, all examples. The others use fewer examples (tables are
the factors, frozen; a sample trains the towers), fewer embedding rows (a learned map; shared rows are random at first
and trained on all examples), or both. Networks and factorization are those of `recpress compare cadc`; every stage is
that of the command line, in its own process.

Quality is NDCG@10 of the held-out rows, which also choose the epoch. The goal is `--of` of the best epoch of the peer.
Networks on factors may use the factors' own ranking (epoch 0). Seconds are those of factorization, cross-fitting, map,
set-up and training until the end of the first epoch that reaches the goal (with factors: of the published epoch),
without evaluations. Memory is the peak of the stage that needs the most, above that at its start (Linux). The row
`factors alone` has no network.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from recpress.benchmarks.common import arguments, bars, lines, publish, settings_of
from recpress.benchmarks.processes import PeakMemory, in_own_processes
from recpress.data.config import SampleConfig, SynthConfig
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.config import EvaluationConfig, NetworkConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.train.stage import TrainResult, train

SMALL = (
    "--users", "1000", "--items", "500", "--rows", "40000", "--factors", "32", "--sweeps", "6", "--epochs", "4",
    "--rates", "0.1", "--shares", "0.2",
)  # fmt: skip
METRIC = "NDCG@10"


@dataclass
class Spent:
    """What stages took, one after the other."""

    seconds: float = 0.0
    peak_mb: float = 0.0

    def and_then(self, seconds: float, peak_mb: float) -> Spent:
        return Spent(self.seconds + seconds, max(self.peak_mb, peak_mb))


@dataclass
class Run:
    """One way to train."""

    tables: str
    rate: float
    share: float
    before: Spent
    trained: TrainResult | None = None
    memory: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    """The evaluations after each epoch."""

    @property
    def best(self) -> float:
        return max(point[METRIC] for point in self.curve)


def stage(function: Callable[..., Any], config: Any, threads: int) -> tuple[Any, float]:
    """(what a stage of the command line returns, its peak memory in MB), run in its own process."""
    return in_own_processes(_stage, 1, function, config, threads)[0]


def _stage(function: Callable[..., Any], config: Any, threads: int) -> tuple[Any, float]:
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        memory = PeakMemory()
        return function(config), memory.bytes / 1e6


class EndToEnd:
    """All ways on one log."""

    def __init__(self, args: argparse.Namespace, log: str, folder: Path) -> None:
        self.args, self.log, self.folder = args, log, folder
        known = CompareCadcConfig()
        self.als: ALSConfig = replace(known.als, factors=args.factors, sweeps=args.sweeps, seed=args.seed)
        tables = replace(known.random.model.tables, dim=args.factors)
        model = replace(known.random.model, tables=tables)
        self.random = replace(known.random, model=model, epochs=args.epochs)
        self.frozen = known.frozen

    def all(self) -> list[Run]:
        """The peer first, then the factors alone."""
        whole = self._train("random", self.random, 1.0, 1.0, Spent(), None, None)
        runs = [whole]
        for place, rate in enumerate(self.args.rates):
            factors, spent, crossfit = self._factorize(rate)
            if place == 0:
                runs.append(self._alone(factors, spent))
            with_crossfit = spent.and_then(*crossfit)
            runs.append(self._train("factors, frozen", self.frozen, rate, 1.0, with_crossfit, factors, None))
            for share in self.args.shares:
                maps, map_seconds, map_memory = self._maps(factors, rate, share)
                if place == 0:
                    hashed = spent.and_then(map_seconds, map_memory)
                    runs.append(self._train("hashed, random", self.random, 1.0, share, hashed, None, maps))
                both = with_crossfit.and_then(map_seconds, map_memory)
                runs.append(self._train("hashed factors, frozen", self.frozen, rate, share, both, factors, maps))
        return runs

    def _factorize(self, rate: float) -> tuple[str, Spent, tuple[float, float]]:
        """Folder of the factors; what they took; seconds and memory of cross-fitting, which a sample needs besides."""
        out = str(self.folder / f"factors-{rate}")
        config = FactorizeConfig(
            data=self.log, out=out, als=self.als, crossfit_rate=rate, crossfit_seed=self.args.seed,
            device=self.args.device,
        )  # fmt: skip
        made, memory = stage(factorize, config, self.args.threads)
        return out, Spent(made.seconds, memory), (made.crossfit_seconds, memory)

    def _maps(self, factors: str, rate: float, share: float) -> tuple[str, float, float]:
        out = str(self.folder / f"maps-{rate}-{share}")
        config = HashStageConfig(
            data=self.log, out=out, factors=factors, share=share, rows_per_id=self.args.rows_per_id, seed=self.args.seed
        )
        made, memory = stage(make_maps, config, self.args.threads)
        return out, made.seconds, memory

    def _alone(self, factors: str, spent: Spent) -> Run:
        config = EvaluateConfig(data=self.log, model=factors, device=self.args.device)
        metrics, memory = stage(evaluate, config, self.args.threads)
        point = {METRIC: metrics[METRIC], "epoch": 0.0, "train_seconds": 0.0}
        return Run("factors alone", 0.0, 1.0, spent.and_then(0.0, memory), curve=[point])

    def _train(
        self, tables: str, network: NetworkConfig, rate: float, share: float, before: Spent, factors: str | None,
        maps: str | None,
    ) -> Run:  # fmt: skip
        print(f"{tables}, {rate:.0%} of the rows of data, {share:.0%} of the rows of table", flush=True)
        settings = {f.name: getattr(network, f.name) for f in fields(NetworkConfig)}
        config = TrainConfig(
            **settings,
            data=self.log,
            out=str(self.folder / f"{tables}-{rate}-{share}".replace(", ", "-").replace(" ", "-")),
            factors=factors,
            hash=maps,
            sample=SampleConfig(rate=rate, seed=self.args.seed),
            evaluation=EvaluationConfig(every=1, patience=0, validation="test"),
            seed=self.args.seed,
            tensorboard=False,
            device=self.args.device,
        )
        trained, memory = stage(train, config, self.args.threads)
        return Run(tables, rate, share, before, trained, memory, curve_of(trained, factors is not None))


def curve_of(trained: TrainResult, factors: bool) -> list[dict[str, float]]:
    """Quality after each epoch; with factors, of the published model alone: during training the tables may be
    cross-fitted ones, and epoch 0 may win."""
    points = trained.fit.evaluations
    if not factors:
        return [point for point in points if point["epoch"] > 0]
    best = next(point for point in points if point["epoch"] == (trained.best_epoch or 0))
    return [{**best, METRIC: trained.metrics[METRIC]}]


def table(runs: list[Run], of: float) -> list[dict[str, Any]]:
    """One row a way; the first run is the peer."""
    goal = of * runs[0].best
    rows = [_row(run, goal) for run in runs]
    for row in rows:
        row["peer's seconds / these"] = rows[0]["seconds to quality"] / row["seconds to quality"]
        row["peer's peak / this"] = rows[0]["peak MB"] / max(row["peak MB"], 1e-9)
    for row in rows:
        if not math.isfinite(row["seconds to quality"]):
            del row["seconds to quality"], row["rows read to quality"]
            del row["peer's seconds / these"]
            row["note"] = f"{goal:.4f} not reached"
    return rows


def _row(run: Run, goal: float) -> dict[str, Any]:
    reached = next((point for point in run.curve if point[METRIC] >= goal), None)
    setup = 0.0 if run.trained is None else run.trained.setup_seconds
    seconds = math.inf if reached is None else run.before.seconds + setup + reached["train_seconds"]
    row: dict[str, Any] = {
        "tables": run.tables,
        "sample rate": run.rate,
        "table share": run.share,
        "seconds to quality": seconds,
        "before the network, s": run.before.seconds,
        "peak MB": max(run.before.peak_mb, run.memory),
        "rows read to quality": 0,
        METRIC: run.best,
    }
    if run.trained is not None:
        row["table MB"] = (run.trained.table_bytes + run.trained.map_bytes) / 1e6
        if reached is not None:
            row["rows read to quality"] = round(run.trained.rows * reached["epoch"])
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", help="a log with held-out rows; without one it is made")
    parser.add_argument("--users", type=int, default=6000)
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3], help="shares of the rows of data")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.5], help="rows of table, of the ids")
    parser.add_argument("--rows-per-id", type=int, choices=[1, 2], default=2, help="rows of an id, hashed")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8, help="of the peer, and of hashed random tables")
    parser.add_argument("--of", type=float, default=0.99, help="of the peer's best quality, what is to be reached")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        folder = Path(name)
        log = args.data
        if log is None:
            log = str(synth(SynthConfig(users=args.users, items=args.items, rows=args.rows), folder / "log"))
        runs = EndToEnd(args, log, folder).all()
    measures = ["seconds to quality", "peak MB", METRIC]
    publish(
        f"End to end: seconds and memory to {args.of:.0%} of the quality of random tables on all rows",
        table(runs, args.of),
        out=args.out,
        settings=settings_of(vars(args), leave_out=("out", "data")) | {"log": Path(args.data or "made").name},
        device="cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu",
        plots=[
            bars(["seconds to quality", "peak MB"], ["tables", "sample rate", "table share"],
                 title="To the same quality"),
            lines(["sample rate"], measures, ["tables", "table share"], title="Sample rate",
                  only={"tables": ["factors, frozen", "hashed factors, frozen"]}),
            lines(["table share"], measures, ["tables", "sample rate"], title="Compression",
                  only={"tables": ["hashed, random", "hashed factors, frozen"]}),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
