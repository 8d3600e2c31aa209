"""The single runs of `compare cadc`: factorize, rank the factors, train one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from recpress.data.dataset.artifact import read_manifest
from recpress.data.dataset.log import Log
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.setup import PerCase, gather_cases, quiet, train_config
from recpress.trainer.config import NetworkConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import FactorizeResult, factorize
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics
from recpress.trainer.train.stage import TrainResult, train


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
    network: Literal["frozen", "random", "tuned"]
    tables: Literal["random", "warm-start", "frozen"]
    sampled: bool

    @property
    def factors(self) -> bool:
        """Whether it starts from the factorization."""
        return self.tables != "random"

    @property
    def crossfit(self) -> bool:
        """Whether it is trained on factors that have not seen its examples."""
        return self.tables == "frozen" and self.sampled


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
)  # fmt: skip


class CadcRuns:
    """Runs stages and reports their results.

    Args:
        folder: of all factors and models.
        log: the log that is compared on.
    """

    def __init__(self, config: CompareCadcConfig, folder: Path, path: str, log: Log, progress: UnitProgress) -> None:
        self.config, self.folder, self.path, self.log, self.progress = config, folder, path, log, progress
        self.metrics = tuple(f"{name}@{config.evaluation.k[0]}" for name in ("HR", "NDCG"))
        self.warnings: list[str] = []
        """Of the factorizations, about themselves."""
        self.factor_bytes = 0
        """Of the last factors."""

    def name(self, strategy: Strategy) -> str:
        return strategy.name.format(rate=f"{100 * self.config.rate:g} %")

    def network(self, strategy: Strategy) -> NetworkConfig:
        network: NetworkConfig = getattr(self.config, strategy.network)
        return network

    def ranked(self, metrics: dict[str, float], cases: Mapping[str, torch.Tensor]) -> Ranked:
        """A ranking of the held-out cases, from what each rank has of them. Collective."""
        return Ranked(metrics, gather_cases(cases, self.metrics))

    def factorize(self, log: str, part: str, seed: int) -> tuple[FactorizeResult, Ranked]:
        """(factorization of `log` in the folder `part`, its own ranking)."""
        out = str(self.folder / part / "factors")
        cases: dict[str, torch.Tensor] = {}
        with self.progress.unit("factorize", f"{part}: factorize"), quiet():
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
        self.factor_bytes = 4 * int(manifest["dim"]) * (self.log.num_users + self.log.num_items)
        checks = manifest.get("checks") or {}
        self.warnings += [f"Factorization of {part}: {text}" for text in checks.get("warnings", ())]
        self.progress.say(
            f"{part}: factorization: {format_metrics(metrics, self.metrics)}; {made.seconds:.1f} s, objective "
            f"{made.sweeps[-1][0]:.6g}; cross-fitted {made.crossfit_seconds:.1f} s"
        )
        return made, self.ranked(metrics, cases)

    def train(
        self, log: str, part: str, out: str, strategy: Strategy, network: Any, seed: int, *, stop_after: int = 0
    ) -> TrainResult:
        """Train and evaluate one network.

        Args:
            part: folder of its factors and of its model, `out`.
            stop_after: epochs; 0: a trial, whose evaluations on the held-out part of `log` say how many are best.
        """
        config, trial = self.config, not stop_after
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
            config.rate if strategy.sampled else 1.0,
            data=log,
            out=str(self.folder / part / out),
            factors=str(self.folder / part / "factors") if strategy.factors else None,
            schema=config.schema,
            evaluation=evaluation,
            stop_after=stop_after,
            device=config.device,
        )
        with quiet():
            return train(settings)
