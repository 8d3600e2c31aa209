"""`recpress compare cadc`: the strategies of the CADC paper side by side, with their times, and a report page."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from recpress.data import holdout
from recpress.data import synth as data_synth
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import Log, open_log
from recpress.trainer.artifacts import shared_artifact
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.report import write_compare_report
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.process_group import agreed, process_group
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
    tables: Literal["random", "init-train", "init-freeze"]
    sampled: bool

    @property
    def factors(self) -> bool:
        """Whether it starts from the factorization."""
        return self.tables != "random"

    @property
    def crossfit(self) -> bool:
        """Whether it is trained on factors that have not seen its rows."""
        return self.tables == "init-freeze" and self.sampled


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
        "tuned", "init-train", True,
    ),
    Strategy(
        "cadc", "MF-init, frozen, {rate} (CADC)",
        "Tables are the factors of the full log, frozen; the towers are trained on the sample, with factors that have "
        "not seen it, and then rank with those of all rows.",
        "frozen", "init-freeze", True,
    ),
    Strategy(
        "freeze-all", "MF-init, frozen, 100 %", "The same factors, frozen; the towers are trained on all rows.",
        "frozen", "init-freeze", False,
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
        with shared_artifact(config.out, COMPARISON, meta, overwrite=config.overwrite) as tmp:
            run = _Comparison(config, tmp)
            result = run.all()
            if ranks.rank == 0:
                result.save(tmp / "result.json")
                write_compare_report(tmp / "report.html", result)
        print(f"\n{format_table(result)}\n\nreport: {config.out}/report.html")
    return result


class _Comparison:
    def __init__(self, config: CompareCadcConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.path = config.data or str(folder / "log")
        with agreed():
            if config.data is None and dist.get_rank() == 0:
                data_synth.synth(config.synth, self.path)
        with agreed():
            self.log = self._open(self.path)
        self.epochs = {strategy.key: self._network(strategy).epochs for strategy in STRATEGIES}
        self.curves: dict[str, tuple[CurvePoint, ...]] = {}

    def all(self) -> CompareResult:
        if self.config.choose:
            self._choose()
        alone: list[SeedResult] = []
        runs: dict[str, list[SeedResult]] = {strategy.key: [] for strategy in STRATEGIES}
        rows: dict[str, int] = {}
        first: FactorizeResult | None = None
        for seed in self.config.seeds:
            made = self._factorize(self.path, f"seed-{seed}", seed)
            first = first or made
            with _quiet(True):
                metrics = evaluate(
                    EvaluateConfig(
                        data=self.path,
                        model=str(self.folder / f"seed-{seed}" / "factors"),
                        schema=self.config.schema,
                        evaluation=self.config.evaluation,
                        device=self.config.device,
                    )
                )
            _say(f"  {show(metrics)}")
            alone.append(SeedResult(seed=seed, metrics=metrics, seconds={"factorize": made.seconds}))
            for strategy in STRATEGIES:
                _say(f"seed {seed}: {self._name(strategy)}")
                trained = self._train(self.path, f"seed-{seed}", strategy, seed, stop_after=self.epochs[strategy.key])
                seconds = {"train": trained.setup_seconds + trained.fit.train_seconds}
                if strategy.factors:
                    seconds = {"factorize": made.seconds} | seconds
                if strategy.crossfit:
                    seconds = {"factorize": made.seconds, "cross-fit": made.crossfit_seconds} | seconds
                curve = self.curves.get(strategy.key, ()) if seed == self.config.seeds[0] else ()
                runs[strategy.key].append(SeedResult(seed=seed, metrics=trained.metrics, seconds=seconds, curve=curve))
                rows[strategy.key] = trained.rows
        assert first is not None
        methods = [self._popularity(), self._factors_alone(alone)]
        methods += [
            MethodResult(
                key=strategy.key,
                name=self._name(strategy),
                description=f"{strategy.description} {self.epochs[strategy.key]} epochs.",
                seeds=tuple(runs[strategy.key]),
                rows=rows[strategy.key],
            )
            for strategy in STRATEGIES
        ]
        return self._result(methods, first)

    def _choose(self) -> None:
        """The number of epochs of each strategy, on one row a user that is held out of train."""
        seed = self.config.seeds[0]
        path = str(self.folder / "choose" / "log")
        with agreed():
            if dist.get_rank() == 0:
                holdout.leave_one_out(self.log, path, by="random", seed=seed)
        self._factorize(path, "choose", seed)
        for strategy in STRATEGIES:
            _say(f"choose epochs: {self._name(strategy)}")
            found = self._train(path, "choose", strategy, seed, look=True).fit
            best = max(found.evaluations[1:], key=lambda metrics: metrics[self.config.evaluation.metric])
            self.epochs[strategy.key] = int(best["epoch"])
            self.curves[strategy.key] = tuple(
                CurvePoint(
                    seconds=point["train_seconds"],
                    epoch=point["epoch"],
                    metrics={name: point[name] for name in (self.config.evaluation.metric,)},
                )
                for point in found.evaluations
            )

    def _factorize(self, log: str, part: str, seed: int) -> FactorizeResult:
        _say(f"{part}: factorize")
        with _quiet(True):
            made = factorize(
                FactorizeConfig(
                    data=log,
                    out=str(self.folder / part / "factors"),
                    schema=self.config.schema,
                    als=replace(self.config.als, seed=seed),
                    crossfit_rate=self.config.rate,
                    crossfit_seed=seed,
                    crossfit_sweeps=self.config.crossfit_sweeps,
                    device=self.config.device,
                )
            )
        _say(f"  {made.seconds:.1f} s, objective {made.sweeps[-1][0]:.6g}; cross-fitted {made.crossfit_seconds:.1f} s")
        return made

    def _train(
        self, log: str, part: str, strategy: Strategy, seed: int, *, stop_after: int = 0, look: bool = False
    ) -> TrainResult:
        network = self._network(strategy)
        settings = {name: getattr(network, name) for name in network.__dataclass_fields__}
        settings["model"] = replace(network.model, tables=replace(network.model.tables, strategy=strategy.tables))
        settings["stream"] = replace(network.stream, seed=seed)
        settings["negatives"] = replace(network.negatives, seed=seed)
        evaluation = replace(  # the held-out part of the log to choose on is held out of train
            self.config.evaluation,
            every=1 if look else 0,
            patience=self.config.patience if look else 0,
            validation="test" if look else "auto",
        )
        with _quiet(True):
            trained = train(
                TrainConfig(
                    **settings,
                    data=log,
                    out=str(self.folder / part / strategy.key),
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

    def _factors_alone(self, seeds: list[SeedResult]) -> MethodResult:
        return MethodResult(
            key="factors",
            name="Factorization alone (MF)",
            description="Weighted least squares on all rows; the score is the dot product. No network.",
            seeds=tuple(seeds),
        )

    def _result(self, methods: list[MethodResult], made: FactorizeResult) -> CompareResult:
        config, log = self.config, self.log
        notes = [
            f"Every network was stopped after the number of epochs, of at most those configured, with the best "
            f"{config.evaluation.metric} on one random row of each user that was held out of train (seed "
            f"{config.seeds[0]}); then it was trained anew on all of train."
            if config.choose
            else "Every network was trained for the configured number of epochs.",
            "Times are wall times on this machine, the factorization's own included, without evaluations.",
        ]
        if config.data is None:
            notes.insert(0, "The log is made: recpress synth planted the tastes that are found in it.")
        return CompareResult(
            title="Collaborative aware data compression"
            + (" on a made log" if config.data is None else f" on {Path(config.data).name}"),
            methods=tuple(methods),
            ours="cadc",
            reference="random-all",
            factorization="factors",
            metrics=tuple(f"{name}@{config.evaluation.k[0]}" for name in ("HR", "NDCG")),
            total_rows=log.train.num_rows,
            sweeps=tuple(
                SweepPoint(sweep=k, objective=objective, seconds=seconds)
                for k, (objective, seconds) in enumerate(made.sweeps, 1)
            ),
            curve_of="rows held out of train",
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
