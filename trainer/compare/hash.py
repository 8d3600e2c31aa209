"""`recpress compare hash`: all hashing methods side by side, with one backbone and one budget of embedding rows.

In order: choose a setting for each method on validation examples, rank the test examples at equal rows and at equal
bytes with every seed, then put the result together. `hash_backbone` trains and ranks, `hash_settings` has the methods.
"""

from __future__ import annotations

import os
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.errors import InputError
from recpress.modules.als.factors import Factors
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.compare.click.comparison import compare_clicks
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_backbone import Backbone, MapStats, Report
from recpress.trainer.compare.hash_light_gcn import LightGCNBackbone
from recpress.trainer.compare.hash_result import (
    FULL,
    HashMethodResult,
    HashResult,
    Ranking,
    format_hash_tables,
    hash_report,
)
from recpress.trainer.compare.hash_settings import NAMES, Setting, search_axes, setting_of
from recpress.trainer.compare.hash_softmax import SoftmaxBackbone
from recpress.trainer.compare.result import run_facts
from recpress.trainer.compare.resume import COMPARISON
from recpress.trainer.compare.ties import all_differences
from recpress.trainer.compare.trials import Choice, search
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics


@dataclass(frozen=True)
class _Chosen:
    setting: Setting
    trials: int
    exist: int


@dataclass
class _Runs:
    """The test runs of one method in one ranking, one per seed."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    by_user: list[np.ndarray] = field(default_factory=list)
    """First metric of each user, (users,) float32."""
    maps: list[MapStats] = field(default_factory=list)
    """Empty for the full table."""
    train_seconds: list[float] = field(default_factory=list)


def compare_hash(config: CompareHashConfig) -> HashResult:
    """Run all methods; print the tables, write `report.html` and `result.json` into `config.out`. One process.

    Raises:
        InputError: the log has no test rows; a budget or a method that cannot be used; `out` exists.
        Preempted: a signal stopped the backbone `lightgcn`, whose runs the same command resumes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare hash runs on one process: start it without torchrun")
    if not config.seeds or not config.sweeps:
        raise InputError("seeds and sweeps: expected at least one of each")
    meta: dict[str, Any] = {"config": asdict(config)}
    with (
        same_command_resumes() if config.backbone == "lightgcn" else nullcontext(),
        artifact.writing(config.out, COMPARISON, meta, overwrite=config.overwrite, inputs=[config.data or ""]) as tmp,
    ):
        comparison = None if config.of_clicks else _Comparison(config, tmp)
        result = compare_clicks(config) if comparison is None else comparison.run()
        result.save(tmp / "result.json")
        hash_report(result).write(tmp / "report.html")
    if comparison is not None:
        comparison.backbone.finish()
    print(f"\n{format_hash_tables(result)}\n\nreport: {config.out}/report.html")
    return result


BACKBONES: dict[str, type[Backbone]] = {"als": Backbone, "softmax": SoftmaxBackbone, "lightgcn": LightGCNBackbone}


class _Comparison:
    def __init__(self, config: CompareHashConfig, folder: Path) -> None:
        self.config, self.backbone = config, BACKBONES[config.backbone](config, folder)
        self.chosen: dict[str, _Chosen] = {}
        self.excluded: dict[str, str] = {}
        """Method that cannot use the budget of rows -> why."""
        self.too_large: dict[str, str] = {}
        """Method that cannot use the budget of bytes -> why."""
        self.at_rows: dict[str, _Runs] = {FULL: _Runs()}
        self.at_bytes: dict[str, _Runs] = {FULL: self.at_rows[FULL]}

    @property
    def rankings(self) -> int:
        return 2 if self.config.equal_bytes else 1

    def run(self) -> HashResult:
        config, backbone = self.config, self.backbone
        # at most one run of each seed and method at equal rows and one at equal bytes, besides the trials
        units = {"factorize": len(config.seeds), FULL: len(config.seeds)}
        units |= {method: config.trials + self.rankings * len(config.seeds) for method in config.methods}
        with UnitProgress("compare hash", units) as self.progress:
            full = self._factorize(config.seeds[0])
            for method in config.methods:
                self._choose(method, full)
            if not self.chosen:
                raise InputError(f"no method can use this budget of rows: {next(iter(self.excluded.values()))}")
            popularity, _ = backbone.test_metrics(torch.ones(backbone.log.num_users, 1), backbone.counts[1][:, None])
            for seed in config.seeds:
                full = self._factorize(seed) if seed != config.seeds[0] else full
                with self.progress.unit(FULL, f"seed {seed}: full table"):
                    vectors, seconds = backbone.full_vectors(full, seed, self._report(f"seed {seed}: full table"))
                    metrics, by_user = backbone.test_metrics(vectors.users, vectors.items)
                self._add(self.at_rows, FULL, metrics, by_user)
                if seconds:
                    self.at_rows[FULL].train_seconds.append(seconds)
                self.progress.say(f"seed {seed}: full table: {format_metrics(metrics, backbone.metrics)}")
                for method, chosen in self.chosen.items():
                    setting = replace(chosen.setting, hash=replace(chosen.setting.hash, seed=seed))
                    self._test(method, setting, full)
        for method in self.too_large:
            self.at_bytes.pop(method, None)
        return self._result(popularity)

    def _factorize(self, seed: int) -> Factors:
        with self.progress.unit("factorize", f"factorization, seed {seed}"):
            full, chosen = self.backbone.factorize(seed)
        if chosen:
            self.progress.say(chosen)
        return full

    def _choose(self, method: str, full: Factors) -> None:
        """Choose the best setting on the validation examples, of as many as every method tries.

        A setting that a method refuses (too few rows for one of the tables, for example) is no trial.
        """
        config, name = self.config, NAMES[method][0]
        maps: dict[Setting, tuple[IdMap, IdMap]] = {}
        trial = 0

        def measure(choice: Choice) -> float:
            nonlocal trial
            setting = setting_of(config, method, dict(zip(axes, choice, strict=True)))
            key = replace(setting, sweeps=0)
            label = f"{name}, trial {trial + 1} of {config.trials}"
            with self.progress.unit(method, label):
                if key not in maps:
                    maps[key], _ = self.backbone.make_maps(setting, full, self.backbone.budget)
                found, _ = self.backbone.fit(setting, maps[key], full, self._report(label))
                trial += 1
                return self.backbone.rank(found.users, found.items, self.backbone.val)[config.metric]

        axes = search_axes(config, method)
        found = search(axes, measure, config.trials)
        self.progress.skip(method, config.trials - found.tried)
        if found.best is None:
            self.progress.say(f"{name}: not run: {found.refused}")
            self.progress.skip(method, self.rankings * len(config.seeds))
            self.excluded[method] = found.refused
            return
        setting = setting_of(config, method, dict(zip(axes, found.best, strict=True)))
        words = "".join(f"; {word} {value}" for word, value in setting.words().items())
        few = "" if found.tried == config.trials else ", all that exist"
        self.progress.say(
            f"{name}: best of {found.tried} settings{few}: {config.metric} {found.value:.4f} of val{words}"
        )
        self.chosen[method] = _Chosen(setting, found.tried, found.exist)

    def _test(self, method: str, setting: Setting, full: Factors) -> None:
        """The test runs of one seed: with the budget of rows, and within the bytes of these rows."""
        label, backbone = f"seed {setting.hash.seed}: {NAMES[method][0]}", self.backbone
        with self.progress.unit(method, f"{label}, equal rows"):
            maps, stats = backbone.make_maps(setting, full, backbone.budget)
            metrics = self._test_run(self.at_rows, method, setting, maps, stats, full, label)
        self.progress.say(f"{label}: {format_metrics(metrics, backbone.metrics)}")
        if not self.config.equal_bytes:
            return
        if not stats.nbytes:  # a formula: the same run
            self.at_bytes[method] = self.at_rows[method]
            self.progress.skip(method, 1)
            return
        with self.progress.unit(method, f"{label}, equal bytes"):
            smaller = backbone.make_maps_within_bytes(setting, full, stats.nbytes)
            if isinstance(smaller, str):
                self.too_large[method] = smaller
                self.progress.say(f"{label}: {smaller}")
                return
            metrics = self._test_run(self.at_bytes, method, setting, *smaller, full, label)
        shown = format_metrics(metrics, backbone.metrics)
        self.progress.say(f"{label}, equal bytes ({smaller[1].rows:,} rows): {shown}")

    def _test_run(
        self,
        ranking: dict[str, _Runs],
        method: str,
        setting: Setting,
        maps: tuple[IdMap, IdMap],
        stats: MapStats,
        full: Factors,
        label: str,
    ) -> dict[str, float]:
        found, seconds = self.backbone.fit(setting, maps, full, self._report(label))
        metrics, by_user = self.backbone.test_metrics(found.users, found.items)
        self._add(ranking, method, metrics, by_user)
        ranking[method].maps.append(stats)
        ranking[method].train_seconds.append(seconds)
        return metrics

    def _report(self, label: str) -> Report:
        return lambda line: self.progress.say(f"{label}: {line}")

    def _add(self, ranking: dict[str, _Runs], method: str, metrics: dict[str, float], by_user: np.ndarray) -> None:
        runs = ranking.setdefault(method, _Runs())
        runs.metrics.append(metrics)
        runs.by_user.append(by_user)

    def _result(self, popularity: dict[str, float]) -> HashResult:
        config, backbone = self.config, self.backbone

        def ranking(found: dict[str, _Runs]) -> Ranking:
            methods = tuple(self._method(key, runs) for key, runs in found.items())
            return Ranking(methods=methods, differences=all_differences({k: runs.by_user for k, runs in found.items()}))

        shown = replace(config, als=replace(config.als, **backbone.chosen_als))
        facts = run_facts("Learned hash functions", shown, backbone.log)
        facts["data"] |= {
            "train examples": len(backbone.train[0]),
            "budget of rows": backbone.budget,
            "budget of bytes": backbone.row_bytes * backbone.budget,
            "backbone": config.backbone,
            "dimension": backbone.vector_dim,
            "trials of each method": config.trials,
        }
        result = HashResult(
            **facts,
            rows=ranking(self.at_rows),
            bytes=ranking(self.at_bytes) if config.equal_bytes else None,
            byte_budget=backbone.row_bytes * backbone.budget,
            too_large={NAMES[key][0]: why for key, why in self.too_large.items()},
            popularity=popularity,
            ours="learned-2" if "learned-2" in self.chosen else [*self.chosen][-1],
            full=FULL,
            metrics=backbone.metrics,
            notes=_notes(config, backbone),
        )
        warnings = [f"{NAMES[key][0]} was not run: {why}" for key, why in self.excluded.items()]
        no_signal = result.no_signal()
        return replace(result, warnings=(*warnings, *backbone.warnings, *([no_signal] if no_signal else [])))

    def _method(self, key: str, runs: _Runs) -> HashMethodResult:
        name, description = NAMES.get(key, ("Full table", "One row per id: the upper bound."))
        chosen, maps = self.chosen.get(key), runs.maps
        rows = round(statistics.fmean(m.rows for m in maps)) if maps else self.backbone.ids
        return HashMethodResult(
            key=key,
            name=name,
            description=description,
            setting=chosen.setting.words() if chosen else {},
            trials=chosen.trials if chosen else 0,
            settings_exist=chosen.exist if chosen else 0,
            metrics=tuple(runs.metrics),
            rows=rows,
            row_bytes=self.backbone.row_bytes * rows,
            map_bytes=round(statistics.fmean(m.nbytes for m in maps)) if maps else 0,
            serving_map_bytes=round(statistics.fmean(m.serving_bytes for m in maps)) if maps else 0,
            map_seconds=tuple(m.seconds for m in maps),
            train_seconds=tuple(runs.train_seconds),
        )


def _notes(config: CompareHashConfig, backbone: Backbone) -> tuple[str, ...]:
    """How it was measured."""
    return (
        backbone.NOTE,
        f"Each method has the setting with the best {config.metric} on validation examples of "
        f"{backbone.val.num_cases:,} users (seed {config.seeds[0]}), of {config.trials} trials, the same number for "
        "every method; a method with fewer settings tries all of them. Test examples are ranked among all items; train "
        "and validation items are masked; ties of scores, which ids in one row have, are broken at random for all "
        "methods alike.",
        *(
            [
                "Two rankings: at the same number of rows, and at the same bytes, those of the budget of rows without "
                "a map. There a method pays for its map with rows; a formula needs no map. Settings are those chosen "
                "at equal rows."
            ]
            if config.equal_bytes
            else []
        ),
        "Stored bytes count maps bit-packed with their weights; bytes at serving count them as `LearnedHash` stores "
        "them, with int32 row numbers (with packed=True it takes the stored bytes).",
        f"Methods share a place (=) if their difference in {backbone.metrics[0]} is within noise: a paired test over "
        "the users and the seeds, at 5 % for each pair. = after a share of the full table: level with it.",
    )
