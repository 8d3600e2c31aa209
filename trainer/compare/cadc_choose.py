"""`compare cadc`, first part: choose settings and number of epochs of each strategy on validation examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from recpress.trainer.compare.bpr import BPRMethod
from recpress.trainer.compare.cadc_result import CurvePoint
from recpress.trainer.compare.cadc_runs import CadcRuns, FactorMethod, Strategy
from recpress.trainer.compare.config import TRIALS, changed
from recpress.trainer.compare.setup import open_heldout, split_validation
from recpress.trainer.factorize.stage import FactorizeResult
from recpress.trainer.report.numbers import format_metrics
from recpress.trainer.train.stage import TrainResult

Curves = dict[FactorMethod, tuple[CurvePoint, ...]]


@dataclass(frozen=True)
class Chosen:
    """What the validation examples chose for a strategy."""

    network: Any
    epochs: int
    """0: no network was better than the factorization, whose ranking is published."""
    curve: tuple[CurvePoint, ...] = ()
    words: str = "as configured"
    seconds: float = 0.0
    """Training of the trial that was chosen."""
    rows: int = 0
    table_bytes: int = 0


def choose(runs: CadcRuns, peer: BPRMethod | None) -> tuple[dict[str, Chosen], Curves]:
    """(strategy -> what was chosen, each factorization's own curve). The peer remembers its choice. Collective.

    Validation examples are one random train example of each user, held out.
    """
    config, seed, metric = runs.config, runs.config.seeds[0], runs.config.evaluation.metric
    path = str(runs.folder / "choose" / "log")
    split_validation(runs.log, path, seed, negatives=99)
    made: dict[FactorMethod, tuple[FactorizeResult, CurvePoint]] = {}
    for method in runs.factorizations:
        result, ranked = runs.factorize(path, "choose", seed, method)
        made[method] = result, CurvePoint(seconds=result.seconds, epoch=0, metrics={metric: ranked.metrics[metric]})
    found = {s.key: _choose_network(runs, path, s, *made[s.factorization]) for s in runs.strategies}
    if peer is not None and peer.available:
        log = open_heldout(path, config)
        for trial in range(config.trials):
            with runs.progress.unit("choose bpr", f"{peer.name}, trial {trial + 1} of {config.trials}"):
                runs.progress.say(f"{peer.name}, trial {trial + 1} of {config.trials}: {peer.trial(log, trial, seed)}")
    return found, {method: (point,) for method, (_, point) in made.items()}


def _choose_network(
    runs: CadcRuns, path: str, strategy: Strategy, made: FactorizeResult, factors: CurvePoint
) -> Chosen:
    """The best of `config.trials` settings."""
    config, seed, metric = runs.config, runs.config.seeds[0], runs.config.evaluation.metric
    before = made.seconds if strategy.factors else 0.0
    before += made.crossfit_seconds if strategy.crossfit else 0.0
    if strategy.subset is not None:
        before += runs.subset(path, "choose", strategy.subset, seed)[1]
    factors_quality = factors.metrics[metric]
    best, best_quality = None, 0.0
    for number, change in enumerate(TRIALS[strategy.network][: config.trials], 1):
        words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in change.items()) or "as configured"
        label = f"{runs.name(strategy)}, trial {number} of {config.trials}, {words}"
        with runs.progress.unit(f"choose {strategy.key}", label):
            network = changed(runs.network(strategy), change)
            result = runs.train(path, "choose", f"{strategy.key}-{number}", strategy, network, seed)
        runs.progress.say(f"{label}: {format_metrics(result.metrics, runs.metrics)}; {result.fit.train_seconds:.1f} s")
        quality, epoch = result.metrics[metric], int(result.best_epoch or 0)
        fallback = strategy.may_keep_factors and (result.fallback or quality < factors_quality)
        if fallback:
            quality = factors_quality
        elif not epoch:  # the network is published in any case
            top = max(result.fit.evaluations[1:], key=lambda point: point[metric])
            quality, epoch = top[metric], int(top["epoch"])
        if best is None or quality > best_quality:
            best_quality = quality
            best = Chosen(
                network,
                0 if fallback else max(1, epoch),
                _curve(strategy, result, before, metric, factors),
                words,
                result.setup_seconds + result.fit.train_seconds,
                result.rows,
                result.table_bytes,
            )
    assert best is not None
    if not best.epochs:
        runs.progress.skip(strategy.key, len(config.seeds))
    return best


def _curve(
    strategy: Strategy, result: TrainResult, before: float, metric: str, factors: CurvePoint
) -> tuple[CurvePoint, ...]:
    """Quality against all time spent. What starts from factors has their quality (epoch 0) once these are made.

    With cross-fitted factors the evaluations while training rank with these, and the published model with those of all
    examples: only the two ends of its curve are comparable with other methods.
    """
    before += result.setup_seconds
    points = {
        point["epoch"]: CurvePoint(
            seconds=before + point["train_seconds"], epoch=point["epoch"], metrics={metric: point[metric]}
        )
        for point in result.fit.evaluations
    }
    best = int(result.best_epoch or 0)
    if strategy.may_keep_factors:
        points[0] = factors
    elif strategy.factors:
        points.pop(0, None)
    if strategy.crossfit:
        points = {epoch: point for epoch, point in points.items() if epoch in (0, best)}
        if best:
            points[best] = replace(points[best], metrics={metric: result.metrics[metric]})
    return tuple(points[epoch] for epoch in sorted(points))
