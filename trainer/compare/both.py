"""`recpress compare both`: fewer examples and fewer embedding rows together, from one factorization.

In order: choose the networks' number of epochs on validation examples; then for each seed and sample rate factorize,
choose the form of the tables for each level of bytes (`both_tables`), and rank the held-out examples.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.modules.config import ContrastiveConfig
from recpress.modules.row_source import round_up
from recpress.trainer.artifacts.factors import FactorsArtifact, open_factors
from recpress.trainer.compare.both_result import BothResult, Point, both_report, format_both_table
from recpress.trainer.compare.both_tables import Form, FullTables
from recpress.trainer.compare.config import CompareBothConfig
from recpress.trainer.compare.result import run_facts
from recpress.trainer.compare.resume import comparison_folder, factorize_once, train_once
from recpress.trainer.compare.setup import prepare_log, quiet, split_validation, train_config
from recpress.trainer.config import EvaluationConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics
from recpress.trainer.train.stage import TrainResult


def compare_both(config: CompareBothConfig) -> BothResult:
    """Run all levels of bytes and sample rates; print the table, write `report.html` and `result.json`.

    Raises:
        InputError: the log has no held-out rows; settings that cannot be used; `out` exists.
        Preempted: a signal stopped it. The same command loads the finished runs.
    """
    if not config.seeds or not config.levels:
        raise InputError("seeds and levels: expected at least one of each")
    with process_group(config.device) as ranks:
        with comparison_folder(config) as folder:
            result = _Comparison(config, folder).run()
            if ranks.rank == 0:
                result.save(folder / "result.json")
                both_report(result).write(folder / "report.html")
        if ranks.rank == 0:
            print(f"\n{format_both_table(result)}\n\nreport: {config.out}/report.html")
    return result


class _Comparison:
    def __init__(self, config: CompareBothConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.path, self.log = prepare_log(config, folder)
        self.metrics = tuple(f"{name}@{config.evaluation.k[0]}" for name in config.metrics)
        self.ids = self.log.num_users + self.log.num_items
        self.dim = 0
        """Of the vectors; known after the first factorization."""
        self.als, self.softmax, self.chosen = config.als, config.softmax, False
        self.method: Literal["als", "softmax", "auto"] = config.method
        """With what the first factorization chose, by the protocol that ranks."""
        if config.evaluation.protocol == "full" and self.als.auto_metric == "auto":
            self.als = replace(self.als, auto_metric="full")
        self.warnings: list[str] = []
        """Signs that a factorization collapsed."""
        self.found: dict[tuple[float, float], list[dict[str, float]]] = {}
        """(level, sample rate) -> metrics of each seed."""
        self.facts: dict[tuple[float, float], dict[str, Any]] = {}

    def run(self) -> BothResult:
        config = self.config
        rates = config.rates or (0.0,)
        networks, seeds, levels = len(config.rates), len(config.seeds), len(config.levels)
        choices = networks if config.choose else 0
        units = {
            "factorize": choices + seeds * len(rates),
            "choose": choices,
            "tables": seeds * len(rates) * levels,
            "rank": seeds * levels,
            "network": seeds * networks * levels,
        }
        with UnitProgress("compare both", units, show=dist.get_rank() == 0) as self.progress:
            self.epochs = {rate: self._choose_epochs(rate) for rate in config.rates}
            for seed in config.seeds:
                for rate in rates:
                    factors = self._factorize(self.path, f"{seed}-{rate}", seed, rate)
                    tables = FullTables(config, self.path, self.log, factors)
                    for level in sorted(config.levels, reverse=True):
                        with self.progress.unit("tables", f"tables of {level:.3g} of the bytes, seed {seed}"):
                            form = tables.best_form(level, str(self.folder / f"maps-{seed}-{rate}-{level}"), seed)
                        self._rank_form(form, factors, seed, rate, alone_too=rate == rates[0])
        return self._result()

    def _choose_epochs(self, rate: float) -> int:
        """Epochs of the networks with this sample rate, 0 to those configured.

        They are the best on one example of each user that is held out of train, with full tables and the first seed.
        Epoch 0 is the factors' own ranking: if no epoch ranks better, no network is trained.
        """
        config, seed = self.config, self.config.seeds[0]
        if not config.choose:
            return config.frozen.epochs
        path = str(self.folder / "choose" / "log")
        full = config.evaluation.protocol == "full" or self.log.test_negatives is None
        split_validation(self.log, path, seed, negatives=0 if full else 99)
        factors = self._factorize(path, f"choose-{rate}", seed, rate)
        evaluation = replace(config.evaluation, every=1, validation="test")  # the held-out part of the split log
        with self.progress.unit("choose", f"epochs of the network on {rate:.0%} of the examples"):
            trained = self._train(path, factors.path, f"choose-{rate}", seed, rate, evaluation)
        epochs = trained.best_epoch or 0
        self.progress.say(
            f"network on {rate:.0%} of the examples: best of {config.frozen.epochs} epochs is {epochs}"
            + ("" if epochs else ", the factors' own ranking: no network is trained")
        )
        return epochs

    def _factorize(self, log: str, name: str, seed: int, rate: float) -> FactorsArtifact:
        path = str(self.folder / f"factors-{name}")
        with self.progress.unit("factorize", f"factorization, {name}"), quiet():
            result = factorize_once(
                FactorizeConfig(
                    data=log,
                    out=path,
                    schema=self.config.schema,
                    method=self.method,
                    als=replace(self.als, seed=seed),
                    softmax=replace(self.softmax, seed=seed),
                    crossfit_rate=rate if rate < 1 else 0.0,
                    crossfit_seed=seed,
                    device=self.config.device,
                ),
                self.progress,
            )
        with raise_on_all_ranks():
            factors = open_factors(path, self.log)
        self.dim = factors.dim
        if not self.chosen:  # once: all seeds and rates compare the same tables
            self.chosen, self.method = True, "softmax" if result.method == "softmax" else "als"
            if result.method == "softmax":
                assert result.parameters is not None
                self.softmax = ContrastiveConfig(**result.parameters)
            elif result.auto is not None and self.als.auto:
                self.als = replace(self.als, auto=False, **result.auto["settings"])
            if result.auto is not None:
                shown = ", ".join(f"{setting} {value:g}" for setting, value in result.auto["settings"].items())
                self.progress.say(f"factorization: chose {result.method}, {shown}")
        self.warnings += [text for text in result.checks["warnings"] if text not in self.warnings]
        return factors

    def _rank_form(self, form: Form, factors: FactorsArtifact, seed: int, rate: float, *, alone_too: bool) -> None:
        """Rank the held-out examples with the vectors of one form alone, and with a network on its tables."""
        words, epochs = form.words(self.ids), self.epochs.get(rate, 0)
        if alone_too or (rate and not epochs):
            with self.progress.unit("rank", f"{words}, seed {seed}: factors alone"):
                alone = self._rank_alone(form)
        if alone_too:
            self._add(form, 0.0, alone, bytes=form.bytes, rows_read=0, epochs=0)
            self.progress.say(f"seed {seed}, {words}: factors alone {format_metrics(alone, self.metrics)}")
        if not rate:
            return
        if epochs:
            name = f"model-{seed}-{rate}-{form.level}"
            evaluation = replace(self.config.evaluation, every=0, every_steps=0)
            with self.progress.unit("network", f"{words}, seed {seed}: network on {rate:.0%} of the examples"):
                found = self._train(self.path, factors.path, name, seed, rate, evaluation, form=form)
            metrics, size, rows_read = found.metrics, found.table_bytes + found.map_bytes, found.rows
        else:  # the network before its first step ranks as the factors do
            metrics, size, rows_read = alone, form.bytes, 0
            self.progress.skip("network", 1)
        self._add(form, rate, metrics, bytes=size, rows_read=rows_read, epochs=epochs)
        shown = format_metrics(metrics, self.metrics)
        self.progress.say(f"seed {seed}, {words}, {rate:.0%} of the examples: {shown}")

    def _rank_alone(self, form: Form) -> dict[str, float]:
        heldout = load_heldout(self.log, self.config.evaluation)
        users, items = (vectors_from_factors(table) for table in form.vectors)
        return rank_heldout(heldout, users, items, self.config.evaluation, torch.device("cpu"))

    def _train(
        self,
        log: str,
        factors: str,
        name: str,
        seed: int,
        rate: float,
        evaluation: EvaluationConfig,
        form: Form | None = None,
    ) -> TrainResult:
        """Train a network on the tables of a form for the chosen epochs; without one, a trial on full tables."""
        config = train_config(
            self.config.frozen,
            {"strategy": "frozen", "storage": form.storage if form else "fp32"},
            seed,
            rate,
            data=log,
            out=str(self.folder / name),
            factors=factors,
            hash=form.hash if form else None,
            schema=self.config.schema,
            evaluation=evaluation,
            stop_after=self.epochs[rate] if form else 0,
            device=self.config.device,
        )
        with quiet():
            return train_once(config, self.progress)

    def _add(self, form: Form, rate: float, metrics: dict[str, float], **facts: int) -> None:
        """Add one seed's metrics to a point."""
        key = form.level, rate
        self.found.setdefault(key, []).append(metrics)
        self.facts[key] = {
            "form": form.words(self.ids),
            "rows": form.rows,
            "error": form.error,
            "serving_bytes": facts["bytes"] - form.map_bytes + form.serving_map_bytes,
            **facts,
        }

    def _result(self) -> BothResult:
        points = tuple(
            Point(
                level=level,
                rate=rate,
                metrics={name: tuple(run[name] for run in runs) for name in self.metrics},
                **self.facts[level, rate],
            )
            for (level, rate), runs in self.found.items()
        )
        shown = replace(self.config, method=self.method, als=self.als, softmax=self.softmax)
        facts = {"dimension": self.dim, "ranks": dist.get_world_size()}
        return BothResult(
            **run_facts("Fewer examples, fewer bytes of tables", shown, self.log, **facts),
            points=points,
            metrics=self.metrics,
            full_bytes=4 * round_up(self.dim) * self.ids,
            total_rows=self.log.train.num_rows,
            warnings=tuple(f"{text}." for text in self.warnings),
            notes=_notes(self.config),
        )


def _notes(config: CompareBothConfig) -> tuple[str, ...]:
    """How it was measured."""
    if config.choose:
        epochs = (
            f"Their number of epochs is the best of 0 to {config.frozen.epochs} on one random example of each user "
            f"that was held out of train, chosen with full tables and seed {config.seeds[0]}; 0 is the factors' own "
            "ranking."
        )
    else:
        epochs = "Their number of epochs is the configured one."
    return (
        "One factorization of the full log makes the tables, the maps and the cross-fitted factors. At each level of "
        "bytes the storage (32, 16, 8 or 4 bits) and the number of rows are those with the least weighted distortion "
        "of the vectors, in units of the scores; held-out examples have no part in it. If there are fewer rows than "
        "ids, the vector of an id is the weighted sum of two rows.",
        "Stored bytes count rows with their scales, maps bit-packed with their weights, and for networks the tables of "
        "counts. Bytes at serving count maps as `LearnedHash` stores them, with int32 row numbers. Networks are "
        f"trained on frozen tables, on the given share of the examples. {epochs}",
        "= marks a metric that is level with that of full tables, by a paired t-test over the seeds at 5 %; with one "
        "seed nothing is marked.",
    )
