"""`recpress compare cadc`: the strategies of the CADC paper side by side, with their times, and a report page.

In order: choose settings on validation examples (`cadc_choose`), train every strategy with every seed, then put the
result together (`cadc_result`). `cadc_runs` has the single runs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.trainer.compare import bpr
from recpress.trainer.compare.bpr import BPRMethod
from recpress.trainer.compare.cadc_choose import Chosen, Curves, choose
from recpress.trainer.compare.cadc_report import cadc_report
from recpress.trainer.compare.cadc_result import (
    CadcResult,
    MethodResult,
    SeedResult,
    SweepPoint,
    format_table,
)
from recpress.trainer.compare.cadc_runs import FACTORS, CadcRuns, FactorMethod, Ranked, Strategy, runnable
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.compare.result import run_facts
from recpress.trainer.compare.resume import comparison_folder
from recpress.trainer.compare.setup import PerCase, gather_cases, prepare_log, rank_by_popularity
from recpress.trainer.compare.ties import Difference, all_differences
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.factorize.stage import FactorizeResult
from recpress.trainer.observability.progress import UnitProgress
from recpress.trainer.report.numbers import format_metrics

_FACTORIZATIONS: dict[str, tuple[str, str]] = {
    "als": (
        "Factorization alone (MF)",
        "Weighted least squares on all examples; the score is the dot product. No network.",
    ),
    "softmax": (
        "Factorization alone (MF)",
        "A contrastive loss of cosines on all examples; the score is the cosine times a power of the item's count. "
        "No network.",
    ),
    "logistic": (
        "Logistic factorization alone",
        "Cross-entropy with biases and sampled negatives on all examples, the factorization of the CADC paper. No "
        "network.",
    ),
}
"""Name and description in the table."""
NO_TIME = "the latest examples need a time column (schema.time), which the log does not have"


def compare_cadc(config: CompareCadcConfig) -> CadcResult:
    """Run all strategies on all seeds; print the table, write `report.html` and `result.json` into `config.out`.

    Raises:
        InputError: the log has no held-out rows, or the settings cannot be used; `out` exists.
        Preempted: a signal stopped it. The same command loads the finished runs.
    """
    if not config.seeds:
        raise InputError("seeds: expected at least one")
    with process_group(config.device) as ranks:
        with comparison_folder(config) as folder:
            result = _compare(config, folder)
            if ranks.rank == 0:
                result.save(folder / "result.json")
                cadc_report(result).write(folder / "report.html")
        if ranks.rank == 0:
            print(f"\n{format_table(result)}\n\nreport: {config.out}/report.html")
    return result


def _compare(config: CompareCadcConfig, folder: Path) -> CadcResult:
    path, log = prepare_log(config, folder)
    peer = BPRMethod(config, folder, log) if config.bpr and log.train.num_rows <= bpr.MAX_ROWS else None
    strategies = runnable(config, log)
    with UnitProgress("compare cadc", _units(config, peer, strategies), show=dist.get_rank() == 0) as progress:
        runs = CadcRuns(config, folder, path, log, progress)
        if "recent-sample" in config.chosen_strategies and log.schema.time is None:
            progress.say(f"recent-sample is skipped: {NO_TIME}")
        chosen = {s.key: Chosen(runs.network(s), runs.network(s).epochs) for s in strategies}
        curves: Curves = {}
        if config.choose:
            chosen, curves = choose(runs, peer)
        factors_seeds: dict[FactorMethod, list[SeedResult]] = {method: [] for method in runs.factorizations}
        per_case: dict[str, list[PerCase]] = defaultdict(list)
        seeds: dict[str, list[SeedResult]] = {strategy.key: [] for strategy in strategies}
        sizes: dict[str, tuple[int, int]] = {}
        first: FactorizeResult | None = None
        used: dict[FactorMethod, str] = {}  # `als` stands for the method of the config
        for seed in config.seeds:
            made: dict[FactorMethod, tuple[FactorizeResult, Ranked]] = {}
            for method in runs.factorizations:
                result, ranked = made[method] = runs.factorize(path, f"seed-{seed}", seed, method)
                used.setdefault(method, result.method)
                times = {"factorize": result.seconds}
                factors_seeds[method].append(SeedResult(seed=seed, metrics=ranked.metrics, seconds=times))
                per_case[FACTORS[method]].append(ranked.per_case)
            first = first or made["als"][0]
            for strategy in strategies:
                found, cases, sizes[strategy.key] = _final_run(
                    runs, strategy, chosen[strategy.key], seed, *made[strategy.factorization]
                )
                seeds[strategy.key].append(found)
                per_case[strategy.key].append(cases)
            if peer is not None and peer.available:
                with progress.unit("bpr", f"seed {seed}: {peer.name}"):
                    found, of_rank = peer.final(seed)
                    per_case[peer.key].append(gather_cases(of_rank, runs.metrics))
                progress.say(f"seed {seed}: {peer.name}: {format_metrics(found.metrics, runs.metrics)}")
    popular_cases: dict[str, torch.Tensor] = {}
    popularity = SeedResult(seed=config.seeds[0], metrics=rank_by_popularity(log, config.evaluation, popular_cases))
    per_case["popularity"].append(gather_cases(popular_cases, runs.metrics))
    methods = [
        MethodResult(
            key="popularity",
            name="Popularity",
            description="Items by their number of examples, the same for every user.",
            seeds=(popularity,),
        ),
        *([peer.result()] if peer is not None else []),
        *(
            MethodResult(
                key=FACTORS[method],
                name=_FACTORIZATIONS[used[method]][0],
                description=_FACTORIZATIONS[used[method]][1],
                seeds=tuple(found),
                table_bytes=runs.factor_bytes[method],
                curve=curves.get(method, ()),
            )
            for method, found in factors_seeds.items()
        ),
    ]
    for strategy in strategies:
        rows, table_bytes = sizes[strategy.key]
        methods.append(
            MethodResult(
                key=strategy.key,
                name=runs.name(strategy),
                description=f"{strategy.description} {_settings(chosen[strategy.key])}",
                seeds=tuple(seeds[strategy.key]),
                rows=rows,
                table_bytes=table_bytes,
                curve=chosen[strategy.key].curve,
            )
        )
    assert first is not None
    differences = {
        metric: all_differences({key: [cases[metric] for cases in seeds] for key, seeds in per_case.items()})
        for metric in runs.metrics
    }
    return _result(runs, peer, methods, first, differences)


def _units(config: CompareCadcConfig, peer: BPRMethod | None, strategies: list[Strategy]) -> dict[str, int]:
    """Number of runs of each kind."""
    seeds, available = len(config.seeds), peer is not None and peer.available
    trials = config.trials if config.choose else 0
    units = {FACTORS[strategy.factorization]: seeds + bool(config.choose) for strategy in strategies}
    units |= {f"choose {strategy.key}": trials for strategy in strategies}
    units |= {strategy.key: seeds for strategy in strategies}
    return units | ({"choose bpr": trials, "bpr": seeds} if available else {})


def _final_run(
    runs: CadcRuns, strategy: Strategy, chosen: Chosen, seed: int, made: FactorizeResult, factors: Ranked
) -> tuple[SeedResult, PerCase, tuple[int, int]]:
    """(one seed of a strategy with the chosen settings, its metrics per case, (examples trained on, bytes of the
    tables))."""
    seconds = {"factorize": made.seconds} if strategy.factors else {}
    if strategy.crossfit:
        seconds["cross-fit"] = made.crossfit_seconds
    if strategy.subset is not None:
        seconds["reduce"] = runs.subset(runs.path, f"seed-{seed}", strategy.subset, seed)[1]
    label = f"seed {seed}: {runs.name(strategy)}"
    if not chosen.epochs:
        runs.progress.say(f"{label}: the factorization's own ranking")
        seconds["train"] = chosen.seconds  # the training that showed it is spent all the same
        found = SeedResult(seed=seed, metrics=factors.metrics, seconds=seconds)
        return found, factors.per_case, (chosen.rows, chosen.table_bytes)
    with runs.progress.unit(strategy.key, label):
        trained = runs.train(
            runs.path, f"seed-{seed}", strategy.key, strategy, chosen.network, seed, stop_after=chosen.epochs
        )
        ranked = runs.ranked(trained.metrics, trained.cases)
    seconds["train"] = trained.setup_seconds + trained.fit.train_seconds
    runs.progress.say(f"{label}: {format_metrics(trained.metrics, runs.metrics)}; {seconds['train']:.1f} s")
    found = SeedResult(seed=seed, metrics=ranked.metrics, seconds=seconds)
    return found, ranked.per_case, (trained.rows, trained.table_bytes)


def _settings(chosen: Chosen) -> str:
    if chosen.epochs:
        return f"Settings: {chosen.words}; {chosen.epochs} epochs."
    return (
        "No network was better than the factorization on the validation examples, so the factorization's own ranking "
        "is published (epoch 0)."
    )


def _result(
    runs: CadcRuns,
    peer: BPRMethod | None,
    methods: list[MethodResult],
    made: FactorizeResult,
    differences: dict[str, tuple[Difference, ...]],
) -> CadcResult:
    config, log = runs.config, runs.log
    heldout = log.test_negatives or log.test
    assert heldout is not None
    facts = {"held_out_examples": heldout.num_rows, "ranks": dist.get_world_size()}
    result = CadcResult(
        **run_facts("Collaborative aware data compression", config, log, **facts),
        methods=tuple(methods),
        differences=differences,
        ours="cadc",
        reference="random-all",
        factorization="factors",
        metrics=runs.metrics,
        notes=tuple(_notes(config, log, peer)),
        goal_metric=config.evaluation.metric,
        total_rows=log.train.num_rows,
        sweeps=tuple(SweepPoint(sweep=k, objective=o, seconds=s) for k, (o, s) in enumerate(made.sweeps, 1)),
        curve_of="validation examples",
    )
    return replace(result, warnings=(*runs.warnings, *_warnings(result)))


def _warnings(result: CadcResult) -> list[str]:
    """What the comparison cannot show, or shows against the method that it is about. A difference within noise shows
    nothing."""
    by, metrics, found = {method.key: method for method in result.methods}, result.metrics, []

    def values(a: MethodResult, b: MethodResult, of: list[str]) -> str:
        return ", ".join(f"{m} {a.mean(m):.4f} against {b.mean(m):.4f}" for m in of)

    for key, cause in (
        ("factors", "the vectors carry no signal, or the regularization does not suit the log"),
        ("random-all", "speed-ups against it say little"),
    ):
        popular = by["popularity"]
        if below := [m for m in metrics if not result.above(by[key], popular, m)]:
            text = values(by[key], popular, below)
            found.append(f"{by[key].name} is no better than popularity ({text}): {cause}.")
    ours = by["cadc"]
    others = [method for key, method in by.items() if key not in ("cadc", "train-sample", "freeze-all")]
    return found + [
        f"{other.name} is better than {ours.name} on this log ({values(other, ours, above)})."
        for other in others
        if (above := [m for m in metrics if result.above(other, ours, m)])
    ]


def _notes(config: CompareCadcConfig, log: Log, peer: BPRMethod | None) -> list[str]:
    """How it was measured."""
    notes = []
    if config.data is None:
        notes.append("The log is synthetic: recpress synth planted the tastes that the methods find.")
    if config.choose:
        same = f"each strategy had {config.trials} trial{'s' if config.trials > 1 else ''}"
        notes += [
            f"Settings and number of epochs of every strategy are those with the best {config.evaluation.metric} on "
            f"one random example of each user that was held out of train (seed {config.seeds[0]}); {same}, stopped "
            f"after {config.patience} epochs without improvement. A strategy that starts from factors may use the "
            "factors' own ranking (epoch 0). Then it was trained again on all of train.",
            "Speed-up: the time of random tables on all examples to their own best quality on those validation "
            "examples, divided by the time of a method to the same quality. Curves have a point per epoch; a method "
            "that starts from factors has the factorization's quality from its end on.",
        ]
    else:
        notes.append(
            "Every network was trained for the configured number of epochs; without validation examples there are no "
            "speed-ups."
        )
    notes.append(
        "Times are wall times on this machine: the factorization with the choice of its settings, cross-fitting, "
        "set-up and training, without evaluations. The time of trials is excluded for all."
    )
    if "recent-sample" in config.chosen_strategies and log.schema.time is None:
        notes.append(f"recent-sample was not run: {NO_TIME}.")
    notes.append(
        "=, above and better: by a paired test over the held-out cases and the seeds, at 5 % for each pair of methods."
    )
    if peer is not None and not peer.available:
        notes.append(f"BPR was not run: the library implicit is not installed ({bpr.INSTALL}).")
    if config.bpr and peer is None:
        notes.append(f"BPR was not run: the log has more than {bpr.MAX_ROWS:,} examples.")
    return notes
