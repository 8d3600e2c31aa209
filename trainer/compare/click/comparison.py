"""`recpress compare hash --backbone dlrm | dcn-v2`: one model of clicks, all its tables compressed by each method.

In order: train with full tables, choose a setting for each method on the validation rows, and measure the test rows
with every seed; once with the budget of rows, once with its bytes. The full tables of a seed are what its maps are
learned from.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from recpress.data.errors import InputError
from recpress.modules.hashing.warm_up import factor
from recpress.trainer.compare.click.data import ClickLog
from recpress.trainer.compare.click.methods import NAMES, WARM, ClickSetting, Compressor, Full, Size, axes
from recpress.trainer.compare.click.tables import MappedTable
from recpress.trainer.compare.click.training import Report, Trained, Trainer
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_result import FULL, HashMethodResult, HashResult, Ranking
from recpress.trainer.compare.result import run_facts
from recpress.trainer.compare.ties import all_differences
from recpress.trainer.compare.trials import Choice, search
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics

METRICS = ("AUC", "LogLoss", "NE")
Budget = str
"""`rows` or `bytes`."""
MPZCH = (
    "MPZCH, TorchRec's managed collisions, is not compared: its kernel assigns rows on CUDA only (on a CPU it can only "
    "read them)."
)


@dataclass(frozen=True)
class _Run:
    trained: Trained
    size: Size
    seconds: float
    """That it took to make the tables."""


@dataclass
class _Runs:
    """One method with one budget."""

    setting: ClickSetting | None = None
    """None for the full tables."""
    trials: int = 0
    exist: int = 0
    value: float = 0.0
    """Of the best trial, on the validation rows."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    by_row: list[np.ndarray] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    map_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)


def compare_clicks(config: CompareHashConfig) -> HashResult:
    """Run all methods. Raises InputError if the log or a budget cannot be used."""
    with process_group("cpu"):
        return _Clicks(config).run()


class _Clicks:
    def __init__(self, config: CompareHashConfig) -> None:
        if config.data is None:
            raise InputError(f"data: missing; --backbone {config.backbone} needs a log with labels")
        self.config, clicks = config, config.click
        self.log = ClickLog(
            config.data,
            chosen_schema(config.schema),
            config.features,
            dim=clicks.dim,
            threshold=config.label_threshold,
        )
        self.trainer = Trainer(config.backbone, self.log, clicks, config.metric)
        inputs = self.trainer.inputs
        lists = [f.name for f in self.log.features.features if f.kind in ("list", "sequence")]
        counts = self.log.counts(self.log.train)
        self.compressor = Compressor(inputs.tables, counts, lists, clicks.epochs)
        self.ids = sum(self.compressor.ids)
        self.budget = config.rows or round(config.share * self.ids)
        if not len(inputs.tables) <= self.budget <= self.ids:
            tables = len(inputs.tables)
            raise InputError(
                f"rows: a budget of {self.budget:,}, expected {tables} to {self.ids:,}, the ids of all tables"
            )
        self.limit = 4 * clicks.dim * self.budget
        self.runs: dict[Budget, dict[str, _Runs]] = {}
        self.excluded: dict[tuple[Budget, str], str] = {}
        """Method that cannot use a budget -> why."""

    def run(self) -> HashResult:
        config = self.config
        budgets = [name for name, chosen in (("rows", config.equal_rows), ("bytes", config.equal_bytes)) if chosen]
        units = {FULL: len(config.seeds)}
        units |= {method: len(budgets) * (config.trials + len(config.seeds) - 1) for method in config.methods}
        whole = _Runs()
        self.runs = {budget: {FULL: whole} for budget in budgets}
        with UnitProgress("compare hash", units) as self.progress:
            for seed in config.seeds:
                trained, full = self._full(seed, whole)
                for budget in budgets:
                    for method in config.methods:
                        if seed == config.seeds[0]:
                            self._choose(budget, method, trained, full)
                        elif method in self.runs[budget]:
                            self._test(budget, method, seed, trained, full)
                if not any(len(found) > 1 for found in self.runs.values()):
                    raise InputError(f"no method can use this budget: {next(iter(self.excluded.values()))}")
        return self._result(budgets)

    def _full(self, seed: int, runs: _Runs) -> tuple[Trained, Full]:
        label = f"seed {seed}: full tables"
        with self.progress.unit(FULL, label):
            torch.manual_seed(seed)
            trained = self.trainer.fit(self.compressor.full(), seed, self._report(label))
            size = Size(self.ids, 4 * self.config.click.dim * self.ids, 0, 0)
            self._measure(runs, _Run(trained, size, 0.0), label)
            by_access = self.trainer.curvature(trained)
            names = self.compressor.names
            tables = [table for table in trained.tables.in_order if isinstance(table, MappedTable)]
            weights = {name: table.rows.weight.detach().clone() for name, table in zip(names, tables, strict=True)}
            scaled = {name: weight @ factor(by_access[name]) for name, weight in weights.items()}
        return trained, Full(weights, scaled)

    def _choose(self, budget: Budget, method: str, trained: Trained, full: Full) -> None:
        """Choose the best setting on the validation rows, of as many as every method tries."""
        config, seed, name = self.config, self.config.seeds[0], f"{NAMES[method][0]}, equal {budget}"
        other = self.runs.get("rows", {}).get(method)
        if budget == "bytes" and other is not None and not other.sizes[0].map_bytes:  # the same settings and budget
            self.runs[budget][method] = other
            self.progress.skip(method, config.trials + len(config.seeds) - 1)
            return
        trials, best = 0, None

        def measure(choice: Choice) -> float:
            nonlocal trials, best
            setting = ClickSetting(method=method, **dict(zip(searched, choice, strict=True)))
            label = f"{name}, trial {trials + 1} of {config.trials}"
            with self.progress.unit(method, label):
                run = self._train(budget, setting, seed, trained, full, label)
            trials += 1
            if best is None or run.trained.value > best.trained.value:
                best = run
            return run.trained.value

        searched = axes(method)
        found = search(searched, measure, config.trials)
        self.progress.skip(method, config.trials - found.tried)
        if best is None or found.best is None:
            self.progress.say(f"{name}: not run: {found.refused}")
            self.progress.skip(method, len(config.seeds) - 1)
            self.excluded[budget, method] = found.refused
            return
        setting = ClickSetting(method=method, **dict(zip(searched, found.best, strict=True)))
        words = "".join(f"; {word} {value}" for word, value in setting.words().items())
        value = f"{config.metric} {abs(found.value):.4f} of val"
        self.progress.say(f"{name}: best of {found.tried} settings: {value}{words}")
        self.runs[budget][method] = runs = _Runs(setting, found.tried, found.exist, found.value)
        self._measure(runs, best, f"seed {seed}: {name}")  # the run of this seed

    def _test(self, budget: Budget, method: str, seed: int, trained: Trained, full: Full) -> None:
        runs = self.runs[budget][method]
        if budget == "bytes" and runs is self.runs.get("rows", {}).get(method):
            return
        assert runs.setting is not None
        label = f"seed {seed}: {NAMES[method][0]}, equal {budget}"
        with self.progress.unit(method, label):
            self._measure(runs, self._train(budget, runs.setting, seed, trained, full, label), label)

    def _train(
        self, budget: Budget, setting: ClickSetting, seed: int, trained: Trained, full: Full, label: str
    ) -> _Run:
        """Raises ValueError if the method cannot use the budget with this setting."""
        began = time.perf_counter()
        rows = self._rows(budget, setting, full, seed)
        tables = self.compressor.make(setting, rows, full, seed)
        seconds = time.perf_counter() - began
        warm = setting.method in WARM and setting.start == "full"
        start, rate = (trained, setting.rate) if warm else (None, 1.0)
        found = self.trainer.fit(tables, seed, self._report(label), start, rate)
        return _Run(found, self.compressor.size(setting, rows), seconds)

    def _rows(self, budget: Budget, setting: ClickSetting, full: Full, seed: int) -> list[int]:
        if budget == "rows":
            return self.compressor.rows(setting, full, self.budget, seed)
        return self.compressor.rows_within_bytes(setting, full, self.limit, seed)

    def _measure(self, runs: _Runs, run: _Run, label: str) -> None:
        """Add the test rows."""
        metrics, by_row = self.trainer.test(run.trained.model)
        runs.metrics.append(metrics)
        runs.by_row.append(by_row)
        runs.sizes.append(run.size)
        runs.map_seconds.append(run.seconds)
        runs.train_seconds.append(run.trained.seconds)
        found = format_metrics(metrics, METRICS)
        self.progress.say(f"{label} ({run.size.rows:,} rows): {found}, epoch {run.trained.epoch}")

    def _report(self, label: str) -> Report:
        return lambda line: self.progress.say(f"{label}: {line}")

    def _result(self, budgets: list[Budget]) -> HashResult:
        config, log = self.config, self.log

        def ranking(budget: Budget) -> Ranking | None:
            found = self.runs.get(budget)
            if found is None:
                return None
            methods = tuple(self._method(key, runs) for key, runs in found.items())
            return Ranking(methods=methods, differences=all_differences({k: runs.by_row for k, runs in found.items()}))

        facts = run_facts("Compressed tables of a click model", config, log.log)
        facts["data"] |= {
            "rows to train on": len(log.train),
            "validation rows": len(log.val),
            "test rows": len(log.test),
            "features": len(log.features.features),
            "tables": len(self.compressor.ids),
            "ids": self.ids,
            "budget of rows": self.budget,
            "budget of bytes": self.limit,
            "backbone": config.backbone,
            "dimension": config.click.dim,
            "trials of each method": config.trials,
        }
        main = self.runs[budgets[-1]]
        learned = [key for key in main if key.startswith("learned")]
        ours = max(learned, key=lambda key: main[key].value) if learned else [*main][-1]
        return HashResult(
            **facts,
            rows=ranking("rows"),
            bytes=ranking("bytes"),
            byte_budget=self.limit,
            too_large={NAMES[key][0]: why for (budget, key), why in self.excluded.items() if budget == "bytes"},
            ours=ours,
            full=FULL,
            metrics=METRICS,
            notes=(*_notes(config, self), MPZCH),
            warnings=tuple(
                f"{NAMES[key][0]} was not run: {why}"
                for (budget, key), why in self.excluded.items()
                if budget == "rows"
            ),
        )

    def _method(self, key: str, runs: _Runs) -> HashMethodResult:
        name, description = NAMES.get(key, ("Full tables", "One row per id: the reference."))

        def mean(attribute: str) -> int:
            return round(statistics.fmean(getattr(size, attribute) for size in runs.sizes))

        return HashMethodResult(
            key=key,
            name=name,
            description=description,
            setting=runs.setting.words() if runs.setting else {},
            trials=runs.trials,
            settings_exist=runs.exist,
            metrics=tuple(runs.metrics),
            rows=mean("rows"),
            row_bytes=mean("row_bytes"),
            map_bytes=mean("map_bytes"),
            serving_map_bytes=mean("serving_map_bytes"),
            map_seconds=tuple(runs.map_seconds) if runs.setting else (),
            train_seconds=tuple(runs.train_seconds),
        )


def _notes(config: CompareHashConfig, clicks: _Clicks) -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"The model is TorchRec's {config.backbone} on {len(clicks.log.features.features)} features. Each run trains "
        f"for at most {config.click.epochs} epochs and stops early; the validation rows choose the epoch. One budget "
        "is shared by all tables: with a common cap for each table, which leaves small ones full, or by distortion, if "
        "a method has an embedding.",
        "`cluster` and `learned` are made from the trained full tables, and may start from them and their network: "
        "they need the memory of the full tables, and their training, once. The other methods never have them.",
        f"Each method has the setting with the best {config.metric} on the validation rows (seed {config.seeds[0]}), "
        f"of {config.trials} trials, the same number for every method and for each budget; a method with fewer "
        "settings tries all of them.",
        "Stored bytes count what finds the rows of an id: bit-packed maps with float16 weights, the list of the ids "
        "with exclusive rows (Frequency, Hybrid), the pointers of CCE's main tables, the sketch of CAFE. Bytes at "
        "serving count it with int32 numbers. Optimizer states are not counted.",
        "Methods share a place (=) if their difference in AUC is within noise: DeLong's paired test over the test "
        "rows, with the variance of the seeds, at 5 % for each pair. = after a share of the full tables: level with "
        "them.",
    )
