"""The single runs of `compare cadc`: factorize, rank the factors, train one network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from recpress.data.dataset.artifact import read_manifest
from recpress.data.dataset.log import Log, open_log
from recpress.data.sampling.subset import SubsetKind, choose_rows, write_subset
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.resume import factorize_once, train_once
from recpress.trainer.compare.setup import PerCase, gather_cases, quiet, train_config
from recpress.trainer.config import NetworkConfig, chosen_schema
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import FactorizeResult
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics
from recpress.trainer.train.stage import TrainResult

FactorMethod = Literal["als", "logistic"]
FACTORS: dict[FactorMethod, str] = {"als": "factors", "logistic": "logistic"}
"""Key of the method in the table, and folder of its factors."""
NAMES: dict[FactorMethod, str] = {"als": "factorization", "logistic": "logistic factorization"}


@dataclass(frozen=True)
class Ranked:
    """How a method ranks the held-out cases."""

    metrics: dict[str, float]
    per_case: PerCase
    """Of the metrics that are compared."""


@dataclass(frozen=True)
class Strategy:
    """One way to train the two-tower network."""

    key: str
    name: str
    description: str
    network: Literal["frozen", "random", "tuned", "paper"]
    tables: Literal["random", "warm-start", "frozen"]
    sampled: bool
    subset: SubsetKind | None = None
    """The examples instead of all or a random sample."""
    logistic: bool = False
    """Whether it starts from the logistic factorization instead of ALS."""

    @property
    def factors(self) -> bool:
        """Whether it starts from a factorization."""
        return self.tables != "random"

    @property
    def crossfit(self) -> bool:
        """Whether it is trained on factors that have not seen its examples."""
        return self.tables == "frozen" and self.sampled and not self.logistic

    @property
    def factorization(self) -> FactorMethod:
        """The one that it starts from."""
        return "logistic" if self.logistic else "als"

    @property
    def may_keep_factors(self) -> bool:
        """Whether the factorization's own ranking is published if no network is better (epoch 0)."""
        return self.factors and not self.logistic


STRATEGIES = (
    Strategy(
        "random-all", "Two-tower, random init, 100 %", "The usual network: tables and towers from random weights.",
        "random", "random", False,
    ),
    Strategy(
        "random-sample", "Two-tower, random init, {rate}", "The same on the sample of the examples.",
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
        "not seen it, and then rank with those of all examples.",
        "frozen", "frozen", True,
    ),
    Strategy(
        "freeze-all", "MF-init, frozen, 100 %", "The same factors, frozen; the towers are trained on all examples.",
        "frozen", "frozen", False,
    ),
    Strategy(
        "core-sample", "Two-tower, random init, k-core, {rate}",
        "Random tables, on the examples of the densest k-core of users and items.", "random", "random", False, "core",
    ),
    Strategy(
        "recent-sample", "Two-tower, random init, latest {rate}", "Random tables, on the latest examples.",
        "random", "random", False, "recent",
    ),
    Strategy(
        "popular-sample", "Two-tower, random init, popular items, {rate}",
        "Random tables, on examples drawn with probability proportional to the count of their item.",
        "random", "random", False, "popular",
    ),
    Strategy(
        "paper", "Logistic MF-init, frozen, {rate} (CADC paper)",
        "The paper's own setting: tables are the factors of the logistic factorization, frozen; MLP towers are trained "
        "on the sample by cross-entropy. The network is published in any case.",
        "paper", "frozen", True, None, True,
    ),
)  # fmt: skip


def runnable(config: CompareCadcConfig, log: Log) -> list[Strategy]:
    """The chosen strategies, without what the log does not allow."""
    chosen = [strategy for strategy in STRATEGIES if strategy.key in config.chosen_strategies]
    return [s for s in chosen if s.subset != "recent" or log.schema.time is not None]


class CadcRuns:
    """Runs stages and reports their results.

    Args:
        folder: of all factors and models.
        log: the log that is compared on.
    """

    def __init__(self, config: CompareCadcConfig, folder: Path, path: str, log: Log, progress: UnitProgress) -> None:
        self.config, self.folder, self.path, self.log, self.progress = config, folder, path, log, progress
        self.metrics = tuple(f"{name}@{config.evaluation.k[0]}" for name in config.metrics)
        self.strategies = runnable(config, log)
        self.warnings: list[str] = []
        """Of the factorizations, about themselves."""
        self.factor_bytes: dict[str, int] = {}
        """Of the last factors of each method."""
        self._subsets: dict[str, float] = {}
        """Path of a subset -> seconds to make it."""

    def name(self, strategy: Strategy) -> str:
        return strategy.name.format(rate=f"{100 * self.config.rate:g} %")

    def network(self, strategy: Strategy) -> NetworkConfig:
        network: NetworkConfig = getattr(self.config, strategy.network)
        return network

    def ranked(self, metrics: dict[str, float], cases: Mapping[str, torch.Tensor]) -> Ranked:
        """A ranking of the held-out cases, from what each rank has of them. Collective."""
        return Ranked(metrics, gather_cases(cases, self.metrics))

    @property
    def factorizations(self) -> list[FactorMethod]:
        """Those that the strategies need, `als` first."""
        return ["als", "logistic"] if any(s.logistic for s in self.strategies) else ["als"]

    def factorize(self, log: str, part: str, seed: int, method: FactorMethod = "als") -> tuple[FactorizeResult, Ranked]:
        """(factorization of `log` in the folder `part`, its own ranking)."""
        out, name = str(self.folder / part / FACTORS[method]), NAMES[method]
        cases: dict[str, torch.Tensor] = {}
        als = method == "als"
        with self.progress.unit(FACTORS[method], f"{part}: {name}"), quiet():
            made = factorize_once(
                FactorizeConfig(
                    data=log,
                    out=out,
                    schema=self.config.schema,
                    method=self.config.method if als else method,
                    als=replace(self.config.als, seed=seed),
                    softmax=replace(self.config.softmax, seed=seed),
                    logistic=replace(self.config.logistic, seed=seed),
                    crossfit_rate=self.config.rate if als else 0.0,
                    crossfit_seed=seed,
                    crossfit_sweeps=self.config.crossfit_sweeps,
                    device=self.config.device,
                ),
                self.progress,
            )
            metrics = evaluate(
                EvaluateConfig(
                    data=log,
                    model=out,
                    schema=self.config.schema,
                    evaluation=self.config.evaluation,
                    device=self.config.device,
                ),
                cases,
            )
        manifest = read_manifest(out)
        self.factor_bytes[method] = 4 * int(manifest["dim"]) * (self.log.num_users + self.log.num_items)
        checks = manifest.get("checks") or {}
        self.warnings += [f"{name.capitalize()} of {part}: {text}" for text in checks.get("warnings", ())]
        crossfit = f"; cross-fitted {made.crossfit_seconds:.1f} s" if als else ""
        self.progress.say(
            f"{part}: {name}: {format_metrics(metrics, self.metrics)}; {made.seconds:.1f} s, objective "
            f"{made.sweeps[-1][0]:.6g}{crossfit}"
        )
        return made, self.ranked(metrics, cases)

    def subset(self, log: str, part: str, kind: SubsetKind, seed: int) -> tuple[str, float]:
        """(the log in the folder `part` that is a subset of `log`, seconds to make it). Collective; made once."""
        path = str(self.folder / part / f"{kind}-log")
        if path not in self._subsets:
            began = time.monotonic()
            with raise_on_all_ranks():
                if dist.get_rank() == 0:
                    shutil.rmtree(path, ignore_errors=True)  # of a stopped run; for the time
                    whole = open_log(log, chosen_schema(self.config.schema))
                    chosen = choose_rows(whole, kind, self.config.rate, seed)
                    write_subset(whole, path, chosen, made_by=f"compare cadc, {kind}")
            self._subsets[path] = time.monotonic() - began
        return path, self._subsets[path]

    def train(
        self, log: str, part: str, out: str, strategy: Strategy, network: Any, seed: int, *, stop_after: int = 0
    ) -> TrainResult:
        """Train and evaluate one network.

        Args:
            part: folder of its factors and of its model, `out`.
            stop_after: epochs; 0: a trial, whose evaluations on the held-out part of `log` say how many are best.
        """
        config, trial = self.config, not stop_after
        data, whole = log, strategy.subset is not None or not strategy.sampled
        if strategy.subset is not None:
            data, _ = self.subset(log, part, strategy.subset, seed)
        evaluation = replace(
            config.evaluation,
            every=1 if trial else 0,
            every_steps=config.evaluation.every_steps if trial else 0,
            patience=config.patience if trial else 0,
            validation="test" if trial else "auto",  # a trial's log holds its validation examples out as test
        )
        settings = train_config(
            network,
            {"strategy": strategy.tables},
            seed,
            1.0 if whole else config.rate,
            data=data,
            out=str(self.folder / part / out),
            factors=str(self.folder / part / FACTORS[strategy.factorization]) if strategy.factors else None,
            schema=config.schema,
            evaluation=evaluation,
            stop_after=stop_after,
            device=config.device,
        )
        with quiet():
            return train_once(settings, self.progress, cases=not trial)
