"""`recpress compare cadc`: the strategies of the CADC paper side by side, with their times, and a report page."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from recpress.data.config import SampleConfig
from recpress.data.dataset.artifact import read_manifest
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.data.ingest import split as holdout
from recpress.data.synthetic import interactions as data_synth
from recpress.trainer.artifacts.factors import shared_artifact
from recpress.trainer.compare import bpr
from recpress.trainer.compare.config import TRIALS, CompareCadcConfig, changed
from recpress.trainer.compare.report import write_compare_report
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import evaluate, load_heldout, rank_heldout, show
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import FactorizeResult, factorize
from recpress.trainer.report.results import (
    CompareResult,
    CurvePoint,
    MethodResult,
    SeedResult,
    SweepPoint,
    format_table,
)
from recpress.trainer.train.stage import TrainResult, train
from recpress.trainer.versions import versions

COMPARISON = "comparison"


@dataclass(frozen=True)
class Strategy:
    """One way to train the two-tower network."""

    key: str
    name: str
    description: str
    network: Literal["frozen", "random", "tuned"]
    tables: Literal["random", "warm-start", "frozen"]
    sampled: bool

    @property
    def factors(self) -> bool:
        """Whether it starts from the factorization."""
        return self.tables != "random"

    @property
    def crossfit(self) -> bool:
        """Whether it is trained on factors that have not seen its rows."""
        return self.tables == "frozen" and self.sampled


STRATEGIES = (
    Strategy(
        "random-all", "Two-tower, random init, 100 %", "The usual network: tables and towers from random weights.",
        "random", "random", False,
    ),
    Strategy(
        "random-sample", "Two-tower, random init, {rate}", "The same on the sample of the rows.",
        "random", "random", True,
    ),
    Strategy(
        "train-sample", "MF-init, trained on, {rate}",
        "Tables start as the factors of the full log and are trained on with the towers, on the sample.",
        "tuned", "warm-start", True,
    ),
    Strategy(
        "cadc", "MF-init, frozen, {rate} (CADC)",
        "Tables are the factors of the full log, frozen; the towers are trained on the sample, with factors that have "
        "not seen it, and then rank with those of all rows.",
        "frozen", "frozen", True,
    ),
    Strategy(
        "freeze-all", "MF-init, frozen, 100 %", "The same factors, frozen; the towers are trained on all rows.",
        "frozen", "frozen", False,
    ),
)  # fmt: skip


def compare_cadc(config: CompareCadcConfig) -> CompareResult:
    """Run all strategies on all seeds; print the table, write `report.html` and `result.json` into `config.out`.

    Raises:
        InputError: the log has no held-out rows, or the settings cannot be used; `out` exists.
    """
    if not config.seeds:
        raise InputError("seeds: expected at least one")
    with process_group(config.device) as ranks, _quiet(ranks.rank != 0):
        meta: dict[str, Any] = {"config": asdict(config)}
        with shared_artifact(config.out, COMPARISON, meta, overwrite=config.overwrite, inputs=[config.data]) as tmp:
            run = _Comparison(config, tmp)
            result = run.all()
            if ranks.rank == 0:
                result.save(tmp / "result.json")
                write_compare_report(tmp / "report.html", result)
        print(f"\n{format_table(result)}\n\nreport: {config.out}/report.html")
    return result


@dataclass(frozen=True)
class _Chosen:
    """What the validation rows chose for a strategy."""

    network: Any
    epochs: int
    """0: no network was better than the factorization, whose ranking is published."""
    curve: tuple[CurvePoint, ...] = ()
    words: str = ""
    seconds: float = 0.0
    """Training of the trial that was chosen."""
    rows: int = 0
    table_bytes: int = 0


class _Steps:
    """Says which part of the comparison runs, and estimates the time left from the parts that are done."""

    def __init__(self) -> None:
        self._left: list[tuple[str, float]] = []
        self._took: dict[str, list[float]] = {}
        self._done, self._weights, self._begin = 0, 0.0, time.monotonic()

    def expect(self, kind: str, weight: float, times: int = 1) -> None:
        """Args: kind: parts of one kind take about as long; weight: of a part, until one of its kind is done."""
        self._left += [(kind, weight)] * times

    @contextmanager
    def part(self, kind: str, words: str) -> Iterator[None]:
        place = next(k for k, (name, _) in enumerate(self._left) if name == kind)
        left = self._seconds_left()
        about = f", about {tqdm.format_interval(left)} left" if left is not None else ""
        _say(f"[{self._done + 1} of {self._done + len(self._left)}{about}] {words}")
        begin = time.monotonic()
        yield
        self._took.setdefault(kind, []).append(time.monotonic() - begin)
        self._weights += self._left.pop(place)[1]
        self._done += 1

    def drop(self, kind: str) -> None:
        """Parts of this kind are not needed after all."""
        self._left = [part for part in self._left if part[0] != kind]

    def _seconds_left(self) -> float | None:
        if not self._weights:
            return None
        pace = (time.monotonic() - self._begin) / self._weights
        known = {kind: sum(took) / len(took) for kind, took in self._took.items()}
        return sum(known.get(kind, weight * pace) for kind, weight in self._left)


class _Comparison:
    def __init__(self, config: CompareCadcConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.path = config.data or str(folder / "log")
        with raise_on_all_ranks():
            if config.data is None and dist.get_rank() == 0:
                data_synth.synth(config.synth, self.path)
        with raise_on_all_ranks():
            self.log = self._open(self.path)
        self.chosen = {
            s.key: _Chosen(self._network(s), self._network(s).epochs, words="as configured") for s in STRATEGIES
        }
        self.alone_curve: tuple[CurvePoint, ...] = ()
        self.peer = _BPR(config, folder, self.log) if config.bpr and self.log.train.num_rows <= bpr.MAX_ROWS else None
        self.checks: list[str] = []
        self.factor_bytes = 0
        self.steps = self._plan()

    def _plan(self) -> _Steps:
        steps, seeds = _Steps(), len(self.config.seeds)
        peer = self.peer is not None and self.peer.available
        if self.config.choose:
            steps.expect("factorize", 2.0)
            for strategy in STRATEGIES:
                steps.expect(f"choose {strategy.key}", self._weight(strategy), self.config.trials)
            steps.expect("choose bpr", 1.0, self.config.trials if peer else 0)
        steps.expect("factorize", 2.0, seeds)
        for strategy in STRATEGIES:
            steps.expect(strategy.key, self._weight(strategy), seeds)
        steps.expect("bpr", 1.0, seeds if peer else 0)
        return steps

    def _weight(self, strategy: Strategy) -> float:
        return (self.config.rate if strategy.sampled else 1.0) * min(self._network(strategy).epochs, 8) + 0.2

    def all(self) -> CompareResult:
        if self.config.choose:
            self._choose()
        alone: list[SeedResult] = []
        runs: dict[str, list[SeedResult]] = {strategy.key: [] for strategy in STRATEGIES}
        trained: dict[str, tuple[int, int]] = {}
        first: FactorizeResult | None = None
        for seed in self.config.seeds:
            made = self._factorize(self.path, f"seed-{seed}", seed)
            first = first or made
            metrics = self._evaluate(self.path, f"seed-{seed}")
            _say(f"  {show(metrics)}")
            alone.append(SeedResult(seed=seed, metrics=metrics, seconds={"factorize": made.seconds}))
            for strategy in STRATEGIES:
                run, trained[strategy.key] = self._final(strategy, seed, made, metrics)
                runs[strategy.key].append(run)
            if self.peer is not None and self.peer.available:
                with self.steps.part("bpr", f"seed {seed}: {self.peer.name}"):
                    _say(f"  {show(self.peer.final(seed).metrics)}")
        assert first is not None
        methods = [self._popularity(), *([self.peer.result()] if self.peer is not None else [])]
        methods += [self._factors_alone(alone)]
        methods += [
            MethodResult(
                key=strategy.key,
                name=self._name(strategy),
                description=f"{strategy.description} {self._words(strategy)}",
                seeds=tuple(runs[strategy.key]),
                rows=trained[strategy.key][0],
                table_bytes=trained[strategy.key][1],
                curve=self.chosen[strategy.key].curve,
            )
            for strategy in STRATEGIES
        ]
        return self._result(methods, first)

    def _final(
        self, strategy: Strategy, seed: int, made: FactorizeResult, alone: dict[str, float]
    ) -> tuple[SeedResult, tuple[int, int]]:
        """(one seed of a strategy with the settings that were chosen, (rows trained on, bytes of the tables))."""
        chosen, name = self.chosen[strategy.key], self._name(strategy)
        seconds = {"factorize": made.seconds} if strategy.factors else {}
        if strategy.crossfit:
            seconds["cross-fit"] = made.crossfit_seconds
        if not chosen.epochs:
            _say(f"seed {seed}: {name}: the factorization's own ranking")
            # the time of the training that was not used is spent all the same
            return SeedResult(seed=seed, metrics=alone, seconds=seconds | {"train": chosen.seconds}), (
                chosen.rows,
                chosen.table_bytes,
            )
        with self.steps.part(strategy.key, f"seed {seed}: {name}"):
            found = self._train(
                self.path, f"seed-{seed}", strategy.key, strategy, chosen.network, seed, stop_after=chosen.epochs
            )
        seconds["train"] = found.setup_seconds + found.fit.train_seconds
        return SeedResult(seed=seed, metrics=found.metrics, seconds=seconds), (found.rows, found.table_bytes)

    def _choose(self) -> None:
        """Settings and number of epochs of each strategy, on one row a user that is held out of train."""
        seed, metric = self.config.seeds[0], self.config.evaluation.metric
        path = str(self.folder / "choose" / "log")
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                holdout.leave_one_out(self.log, path, by="random", seed=seed)
        made = self._factorize(path, "choose", seed)
        alone = self._evaluate(path, "choose")
        _say(f"  {show(alone)}")
        self.alone_curve = (CurvePoint(seconds=made.seconds, epoch=0, metrics={metric: alone[metric]}),)
        for strategy in STRATEGIES:
            before = made.seconds if strategy.factors else 0.0
            before += made.crossfit_seconds if strategy.crossfit else 0.0
            found: list[tuple[float, _Chosen]] = []
            for number, change in enumerate(TRIALS[strategy.network][: self.config.trials], 1):
                words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in change.items())
                words = words or "as configured"
                shown = f"choose settings, trial {number} of {self.config.trials}: {self._name(strategy)}, {words}"
                with self.steps.part(f"choose {strategy.key}", shown):
                    network = changed(self._network(strategy), change)
                    out = f"{strategy.key}-{number}"
                    result = self._train(path, "choose", out, strategy, network, seed, look=True)
                quality = result.metrics[metric]
                fallback = strategy.factors and (result.fallback or quality < alone[metric])
                chosen = _Chosen(
                    network,
                    0 if fallback else max(1, int(result.best_epoch or 0)),
                    _curve(strategy, result, before, metric, self.alone_curve[0]),
                    words,
                    result.setup_seconds + result.fit.train_seconds,
                    result.rows,
                    result.table_bytes,
                )
                found.append((alone[metric] if fallback else quality, chosen))
            self.chosen[strategy.key] = max(found, key=lambda pair: pair[0])[1]
            if not self.chosen[strategy.key].epochs:
                self.steps.drop(strategy.key)
        if self.peer is not None and self.peer.available:
            for number in range(1, self.config.trials + 1):
                with self.steps.part("choose bpr", f"choose settings, trial {number}: {self.peer.name}"):
                    self.peer.trial(self._open(path), number - 1, seed)

    def _evaluate(self, log: str, part: str) -> dict[str, float]:
        """The factors' own ranking."""
        with _quiet(True):
            return evaluate(
                EvaluateConfig(
                    data=log,
                    model=str(self.folder / part / "factors"),
                    schema=self.config.schema,
                    evaluation=self.config.evaluation,
                    device=self.config.device,
                )
            )

    def _factorize(self, log: str, part: str, seed: int) -> FactorizeResult:
        out = str(self.folder / part / "factors")
        with self.steps.part("factorize", f"{part}: factorize"), _quiet(True):
            made = factorize(
                FactorizeConfig(
                    data=log,
                    out=out,
                    schema=self.config.schema,
                    als=replace(self.config.als, seed=seed),
                    crossfit_rate=self.config.rate,
                    crossfit_seed=seed,
                    crossfit_sweeps=self.config.crossfit_sweeps,
                    device=self.config.device,
                )
            )
        manifest = read_manifest(out)
        self.factor_bytes = 4 * int(manifest["dim"]) * (self.log.num_users + self.log.num_items)
        self._note_checks(manifest.get("checks"), part)
        _say(f"  {made.seconds:.1f} s, objective {made.sweeps[-1][0]:.6g}; cross-fitted {made.crossfit_seconds:.1f} s")
        return made

    def _note_checks(self, checks: Any, part: str) -> None:
        """What the factorization found wrong with itself."""
        for text in (checks or {}).get("warnings", ()) if isinstance(checks, dict) else ():
            self.checks.append(f"Factorization of {part}: {text}")

    def _train(
        self,
        log: str,
        part: str,
        out: str,
        strategy: Strategy,
        network: Any,
        seed: int,
        *,
        stop_after: int = 0,
        look: bool = False,
    ) -> TrainResult:
        settings = {name: getattr(network, name) for name in network.__dataclass_fields__}
        settings["model"] = replace(network.model, tables=replace(network.model.tables, strategy=strategy.tables))
        settings["stream"] = replace(network.stream, seed=seed)
        settings["negatives"] = replace(network.negatives, seed=seed)
        evaluation = replace(  # the held-out part of the log to choose on is held out of train
            self.config.evaluation,
            every=1 if look else 0,
            every_steps=self.config.evaluation.every_steps if look else 0,
            patience=self.config.patience if look else 0,
            validation="test" if look else "auto",
        )
        with _quiet(True):
            trained = train(
                TrainConfig(
                    **settings,
                    data=log,
                    out=str(self.folder / part / out),
                    factors=str(self.folder / part / "factors") if strategy.factors else None,
                    schema=self.config.schema,
                    sample=SampleConfig(rate=self.config.rate if strategy.sampled else 1.0, seed=seed),
                    evaluation=evaluation,
                    seed=seed,
                    tensorboard=False,
                    stop_after=stop_after,
                    device=self.config.device,
                )
            )
        _say(f"  {trained.fit.train_seconds:.1f} s, {show(trained.metrics)}")
        return trained

    def _words(self, strategy: Strategy) -> str:
        chosen = self.chosen[strategy.key]
        if not chosen.epochs:
            return (
                "No network was better than the factorization on the validation rows, so the factorization's own "
                "ranking is published (epoch 0)."
            )
        return f"Settings: {chosen.words}; {chosen.epochs} epochs."

    def _network(self, strategy: Strategy) -> Any:
        return getattr(self.config, strategy.network)

    def _name(self, strategy: Strategy) -> str:
        return strategy.name.format(rate=f"{100 * self.config.rate:g} %")

    def _open(self, path: str) -> Log:
        log = open_log(path, chosen_schema(self.config.schema))
        if log.test is None and log.test_negatives is None:
            raise InputError(f"{path}: no held-out rows (test or test_negatives), which a comparison needs")
        return log

    def _popularity(self) -> MethodResult:
        counts = torch.from_numpy(self.log.counts("item")).double()[:, None]
        heldout = load_heldout(self.log, self.config.evaluation)
        metrics = rank_heldout(
            heldout,
            lambda users: torch.ones(len(users), 1),
            vectors_from_factors(counts),
            self.config.evaluation,
            torch.device("cpu"),
        )
        return MethodResult(
            key="popularity",
            name="Popularity",
            description="Items by their number of rows, the same for every user.",
            seeds=(SeedResult(seed=self.config.seeds[0], metrics=metrics),),
        )

    def _warnings(self, methods: list[MethodResult]) -> list[str]:
        """What the comparison does not show, or shows against the method that it is about."""
        by = {method.key: method for method in methods}
        metrics, found = self._metrics(), list(self.checks)
        for key in ("factors", "random-all"):
            below = [m for m in metrics if by[key].mean(m) <= by["popularity"].mean(m)]
            if below:
                cause = (
                    "the vectors carry no signal, or the regularization does not suit the log"
                    if key == "factors"
                    else "speed-ups against it say little"
                )
                values = ", ".join(f"{m} {by[key].mean(m):.4f} against {by['popularity'].mean(m):.4f}" for m in below)
                found.append(f"{by[key].name} is no better than popularity ({values}): {cause}.")
        for key in ("popularity", "bpr", "factors", "random-all"):
            other, ours = by.get(key), by["cadc"]
            above = [m for m in metrics if other is not None and other.mean(m) > ours.mean(m)]
            if other is not None and above:
                values = ", ".join(f"{m} {other.mean(m):.4f} against {ours.mean(m):.4f}" for m in above)
                found.append(f"{other.name} is better than {ours.name} on this log ({values}).")
        return found

    def _metrics(self) -> tuple[str, ...]:
        return tuple(f"{name}@{self.config.evaluation.k[0]}" for name in ("HR", "NDCG"))

    def _factors_alone(self, seeds: list[SeedResult]) -> MethodResult:
        return MethodResult(
            key="factors",
            name="Factorization alone (MF)",
            description="Weighted least squares on all rows; the score is the dot product. No network.",
            seeds=tuple(seeds),
            table_bytes=self.factor_bytes,
            curve=self.alone_curve,
        )

    def _result(self, methods: list[MethodResult], made: FactorizeResult) -> CompareResult:
        config, log = self.config, self.log
        same = f"each strategy had {config.trials} trial{'s' if config.trials > 1 else ''}"
        notes = [
            f"Settings and number of epochs of every strategy are those with the best {config.evaluation.metric} on "
            f"one random row of each user that was held out of train (seed {config.seeds[0]}); {same}, stopped after "
            f"{config.patience} epochs without a better one, and what starts from factors may keep the factors' own "
            "ranking (epoch 0). Then it was trained anew on all of train.",
            "Speed-up: the time of random tables on all rows to their own best quality on those validation rows, "
            "divided by the time of a method to the same quality. One epoch is the unit of the curves. A method that "
            "starts from factors has the factorization's quality from the end of the factorization on.",
        ]
        if not config.choose:
            notes = [
                "Every network was trained for the configured number of epochs; without validation rows there are "
                "no speed-ups."
            ]
        notes.append(
            "Times are wall times on this machine: the factorization with the choice of its settings, cross-fitting, "
            "set-up and training, without evaluations. The time of trials is left out for all."
        )
        if self.peer is not None and not self.peer.available:
            notes.append(f"BPR was left out: the library implicit is not installed ({bpr.INSTALL}).")
        if config.bpr and self.peer is None:
            notes.append(f"BPR was left out: the log has more than {bpr.MAX_ROWS:,} rows.")
        if config.data is None:
            notes.insert(0, "The log is made: recpress synth planted the tastes that are found in it.")
        return CompareResult(
            title="Collaborative aware data compression"
            + (" on a made log" if config.data is None else f" on {Path(config.data).name}"),
            methods=tuple(methods),
            ours="cadc",
            reference="random-all",
            factorization="factors",
            metrics=self._metrics(),
            warnings=tuple(self._warnings(methods)),
            goal_metric=config.evaluation.metric,
            total_rows=log.train.num_rows,
            sweeps=tuple(
                SweepPoint(sweep=k, objective=objective, seconds=seconds)
                for k, (objective, seconds) in enumerate(made.sweeps, 1)
            ),
            curve_of="validation rows",
            data={
                "log": "made by recpress synth" if config.data is None else Path(config.data).name,
                "users": log.num_users,
                "items": log.num_items,
                "rows of train": log.train.num_rows,
                "held-out rows": (log.test_negatives or log.test).num_rows,  # type: ignore[union-attr]
                "seeds": ", ".join(map(str, config.seeds)),
                "ranks": dist.get_world_size(),
            },
            notes=tuple(notes),
            config=asdict(config),
            versions=versions(),
            command="recpress " + " ".join(sys.argv[1:]),
        )


class _BPR:
    """The peer: trials as the networks have, iterations chosen on the same validation rows."""

    key, name = "bpr", "BPR (implicit)"
    iterations, every = 100, 10

    def __init__(self, config: CompareCadcConfig, folder: Path, log: Log) -> None:
        self.config, self.folder, self.log = config, folder, log
        self.available = bool(all_reduce(torch.tensor(int(bpr.installed())), dist.ReduceOp.MIN))
        self.best, self.settings, self.stop = -math.inf, bpr.TRIALS[0], self.iterations
        self.curve: tuple[CurvePoint, ...] = ()
        self.seeds: list[SeedResult] = []

    def trial(self, log: Log, number: int, seed: int) -> None:
        """Try one set of settings; keep it where it is the best yet."""
        metric = self.config.evaluation.metric
        found = self._ranked(log, bpr.TRIALS[number], self.iterations, self.every, seed)
        curve = tuple(CurvePoint(seconds=s, epoch=n, metrics={metric: m[metric]}) for n, s, m in found)
        top = max(curve, key=lambda point: point.metrics[metric])
        _say(f"  {metric} {top.metrics[metric]:.4f} after {top.epoch:g} iterations, {top.seconds:.1f} s")
        if top.metrics[metric] > self.best:
            self.best, self.settings, self.stop = top.metrics[metric], bpr.TRIALS[number], int(top.epoch)
            self.curve = curve

    def final(self, seed: int) -> SeedResult:
        """Fit all of train."""
        ((_, seconds, metrics),) = self._ranked(self.log, self.settings, self.stop, 0, seed)
        self.seeds.append(SeedResult(seed=seed, metrics=metrics, seconds={"train": seconds}))
        return self.seeds[-1]

    def result(self) -> MethodResult:
        if not self.available:
            what = f"Not run: the library implicit is not installed ({bpr.INSTALL})."
            return MethodResult(
                key=self.key,
                name=f"{self.name}: not installed",
                description=what,
                seeds=(SeedResult(seed=self.config.seeds[0], metrics={}),),
            )
        words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in self.settings.items())
        return MethodResult(
            key=self.key,
            name=self.name,
            description="Bayesian personalized ranking (Rendle et al. 2009) on all rows, by the library implicit. "
            f"Settings: {words}; {self.stop} iterations.",
            seeds=tuple(self.seeds),
            rows=self.log.train.num_rows,
            table_bytes=4 * (self._dim + 1) * (self.log.num_users + self.log.num_items),
            curve=self.curve,
        )

    @property
    def _dim(self) -> int:
        return int(self.config.random.model.tables.dim)

    def _ranked(
        self, log: Log, settings: dict[str, float], iterations: int, every: int, seed: int
    ) -> list[tuple[int, float, dict[str, float]]]:
        """(iterations, seconds, metrics) of each point. Rank 0 fits; all rank. Collective."""
        place, config = self.folder / "bpr.npz", self.config
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                points = bpr.fit_bpr(log, settings, factors=self._dim, iterations=iterations, every=every, seed=seed)
                arrays: dict[str, np.ndarray] = {"at": np.array([(p.iterations, p.seconds) for p in points])}
                for number, point in enumerate(points):
                    arrays |= {f"users-{number}": point.users, f"items-{number}": point.items}
                np.savez(place, **arrays)  # type: ignore[arg-type]
        heldout, found = load_heldout(log, config.evaluation), []
        with np.load(place, allow_pickle=False) as saved:
            for number, (done, seconds) in enumerate(saved["at"]):
                users, items = (torch.from_numpy(saved[f"{side}-{number}"]) for side in ("users", "items"))
                metrics = rank_heldout(
                    heldout,
                    vectors_from_factors(users),
                    vectors_from_factors(items),
                    config.evaluation,
                    torch.device("cpu"),
                )
                found.append((int(done), float(seconds), metrics))
        dist.barrier()
        if dist.get_rank() == 0:
            place.unlink()
        return found


def _curve(
    strategy: Strategy, result: TrainResult, before: float, metric: str, alone: CurvePoint
) -> tuple[CurvePoint, ...]:
    """Quality against all time spent. What starts from factors has their ranking (epoch 0) once these are made.

    With cross-fitted factors the evaluations while training rank with these, and the model that is published with those
    of all rows: only its two ends are comparable with other methods.
    """
    before += result.setup_seconds
    points = {
        point["epoch"]: CurvePoint(
            seconds=before + point["train_seconds"], epoch=point["epoch"], metrics={metric: point[metric]}
        )
        for point in result.fit.evaluations
    }
    best = int(result.best_epoch or 0)
    if strategy.factors:
        points[0] = alone
    if strategy.crossfit:
        points = {epoch: point for epoch, point in points.items() if epoch in (0, best)}
        if best:
            points[best] = replace(points[best], metrics={metric: result.metrics[metric]})
    return tuple(points[epoch] for epoch in sorted(points))


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


@contextmanager
def _quiet(hush: bool) -> Iterator[None]:
    """Nothing on standard output from ranks that have nothing to add."""
    if not hush:
        yield
        return
    out, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout = out
