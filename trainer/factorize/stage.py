"""`recpress factorize`: log -> factors, sharded over the ranks."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import SIDES, Log
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import Selection
from recpress.modules.als.auto import DEFAULTS, SettingsChoice
from recpress.modules.als.checks import check_factors
from recpress.modules.als.factorization import ALS, SweepReport
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.als.interactions import CSR
from recpress.modules.config import ALSConfig, ALSParameters
from recpress.modules.contrastive.auto import MethodChoice
from recpress.modules.contrastive.factorization import check as check_contrastive
from recpress.trainer.artifacts.factors import CROSSFIT, FACTORS, describe_log, shared_artifact
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.observability.progress import Progress
from recpress.trainer.open_log import describe_lost, open_on_all_ranks, share_lost

logger = logging.getLogger(__name__)


@dataclass
class FactorizeResult:
    """Times and objectives of a factorization."""

    seconds: float
    """Of reading the log and all sweeps, without cross-fitting and saving."""
    crossfit_seconds: float
    sweeps: list[tuple[float, float]] = field(default_factory=list)
    """Objective after each sweep (of `logistic`, mean loss of each epoch), and seconds since the first began."""
    parameters: dict[str, Any] | None = None
    """Absolute parameters of `als`, or the settings of `softmax`."""
    auto: dict[str, Any] | None = None
    """What was compared to choose the settings of `als` (`als.auto.SettingsChoice`), of `softmax`
    (`contrastive.auto.MethodChoice`), or the method: then the former, with the latter as `softmax`."""
    method: str = "als"
    """The method, if `auto` the chosen one."""
    checks: dict[str, Any] = field(default_factory=dict)
    """`ok`, and `warnings`: signs of a collapse, each with cause and fix."""


def factorize(config: FactorizeConfig) -> FactorizeResult:
    """Factorize the train rows of a log and write the factors to `config.out`.

    Raises:
        InputError: the log or the settings cannot be used; `out` exists. On every rank; nothing is written.
    """
    with process_group(config.device) as ranks, ExitStack() as checkpoints:
        skip = config.on_bad_file == "skip"
        log = open_on_all_ranks(config.data, chosen_schema(config.schema), skip=skip)
        with raise_on_all_ranks():
            if config.use_label and not log.schema.label:
                raise InputError("use_label: expected schema.label, the column that scales the confidence")
            if config.method == "logistic" and config.crossfit_rate:
                raise InputError("crossfit_rate: expected method 'als' or 'softmax'; 'logistic' has no such thing")
        if config.use_label and log.schema.label:
            most = 1 if config.method == "logistic" else math.inf
            log = replace(log, train=log.train.with_labels_in(log.schema.label, 0, most))
        crossfit = None
        if config.crossfit_rate:
            crossfit = SampleConfig(kind=config.crossfit_kind, rate=config.crossfit_rate, seed=config.crossfit_seed)
            with raise_on_all_ranks():
                taken = Selection(log.train, crossfit).num_rows
                if taken == log.train.num_rows:
                    raise InputError(
                        f"{config.data}: a sample of crossfit_rate {config.crossfit_rate:g} takes all {taken:,} rows "
                        "of train, expected at least one more for the cross-fitted factors; use a larger log"
                    )
        meta: dict[str, Any] = {
            "log": describe_log(log),
            "config": asdict(config),
            "crossfit": None if crossfit is None else asdict(crossfit),
        }
        with shared_artifact(config.out, FACTORS, meta, overwrite=config.overwrite, inputs=[config.data]) as tmp:
            begin = time.monotonic()
            made = _fit(config, log, ranks, checkpoints)
            factors = made.factors
            seconds = time.monotonic() - begin + made.seconds_before
            result = FactorizeResult(seconds, 0.0, made.curve, made.parameters, made.auto, made.config.method)
            found = check_factors(factors, made.als, _FIX[made.config.method])
            unused = _unused_ids(log, factors)
            result.checks = {"ok": not found, "warnings": found}
            factors.save(tmp)
            if crossfit is not None:
                begin = time.monotonic()
                (tmp / CROSSFIT).mkdir(exist_ok=True)
                without = _fit(made.config, log, ranks, checkpoints, without=crossfit, before=made)
                without.factors.save(tmp / CROSSFIT)
                result.crossfit_seconds = time.monotonic() - begin + without.seconds_before
            meta |= {"dim": factors.dim, "seconds": asdict(result), **describe_lost(log)}
            meta |= {
                "method": result.method,
                "parameters": result.parameters,
                "auto": result.auto,
                "checks": result.checks,
            }
    if ranks.rank == 0:
        for warning in result.checks["warnings"]:
            logger.warning("%s: %s", config.out, warning)
        if unused:
            logger.warning("%s: %s", config.data, unused)
        print(
            f"{config.out}: {log.num_users:,} users and {log.num_items:,} items x {factors.dim} "
            f"in {result.seconds:.1f} s" + (f" + {result.crossfit_seconds:.1f} s cross-fitted" if crossfit else "")
        )
    return result


_FIX = {
    "als": "",
    "logistic": "lower weight_decay or train for more epochs",
    "softmax": "train for more epochs or raise temperature",
}
"""How to fix factors that have collapsed, by method; `als` knows it from its settings."""
LEAST_USED, LARGE = 0.1, 100_000
"""Warn of a side with more than LARGE ids, of which less than the share LEAST_USED occurs."""


def _unused_ids(log: Log, factors: Factors) -> str:
    """The cost of large gaps between the ids of a log without a vocabulary; "" if there are none. Collective."""
    counts = [factors.user_counts, factors.item_counts]
    used = torch.tensor([0 if of_side is None else int((of_side > 0).sum()) for of_side in counts])
    used = all_reduce(used)
    vocabularies = (log.manifest or {}).get("vocabularies", {})
    found = []
    for side, count in zip(SIDES, used.tolist(), strict=True):
        ids = log.num_ids(side)
        if ids > LARGE and count < LEAST_USED * ids and side not in vocabularies:
            found.append(
                f"only {count:,} of the {side} ids 0 to {ids - 1:,} occur in train, and their table has "
                f"{4 * factors.dim * ids / (1 << 30):.2g} GiB"
            )
    if not found:
        return ""
    return (
        f"{'; '.join(found)}. Ids that do not occur take memory and time, and are drawn as negatives; `recpress "
        "ingest` numbers ids densely"
    )


@dataclass
class _Fitted:
    """A factorization and how it was made."""

    factors: Factors
    curve: list[tuple[float, float]]
    """`FactorizeResult.sweeps`."""
    config: FactorizeConfig
    """With the method and its settings chosen, except those of `als`."""
    als: ALS | None = None
    choice: MethodChoice | None = None
    seconds_before: float = 0.0
    """Of the epochs of `softmax` that an earlier process ran."""

    @property
    def parameters(self) -> dict[str, Any] | None:
        if self.als is not None:
            assert self.als.parameters is not None
            return asdict(self.als.parameters)
        return asdict(self.config.softmax) if self.config.method == "softmax" else None

    @property
    def auto(self) -> dict[str, Any] | None:
        """What was compared to choose settings and method."""
        of_als = None if self.als is None or self.als.choice is None else self.als.choice.describe()
        if self.choice is None:
            return of_als
        return (of_als or {}) | {"softmax": self.choice.describe()} if of_als else self.choice.describe()


def _fit(
    config: FactorizeConfig,
    log: Log,
    ranks: Ranks,
    checkpoints: ExitStack,
    *,
    without: SampleConfig | None = None,
    before: _Fitted | None = None,
) -> _Fitted:
    """Factorize the log. Collective.

    Args:
        without: skip the rows of this sample.
        before: start from these factors, with their settings.
    """
    if config.method == "logistic":
        return _Fitted(*_fit_logistic(config, log, ranks), config)
    settings: ALSConfig | ALSParameters = _protocol(config.als, log)
    if before is not None and before.als is not None:
        assert before.als.parameters is not None
        settings = replace(before.als.parameters, sweeps=config.crossfit_sweeps, tolerance=0.0)
    with raise_on_all_ranks():
        if config.method != "als":
            check_contrastive(config.softmax)
        model = ALS(settings, log.num_users, log.num_items, device=ranks.device)
        for users, items, values in _read(config, log, ranks, without):
            model.add(users, items, values)
    share_lost(log)
    pair = model.builder.build()
    saved = None
    if config.method != "als":
        from recpress.trainer.factorize.softmax import choose_method, factorize_softmax, open_checkpoints  # imports DCP

        saved = open_checkpoints(config, log, checkpoints, part="" if before is None else "crossfit")
        config, choice = choose_method(config, model, pair[0], saved, _protocol(config.als, log).auto_metric)
        if choice is not None and ranks.rank == 0:
            logger.info("%s", choice.line())
        if config.method == "softmax":
            with _stop_on_interrupt("epoch") as stop_requested:
                start = None if before is None else before.factors
                epochs = saved.start.run.get("epochs") if saved.start is not None else None
                made = factorize_softmax(
                    config.softmax, log, ranks, pair, saved, start=start, stop_requested=stop_requested.is_set
                )
            return _Fitted(*made, config, choice=choice, seconds_before=epochs[-1][1] if epochs else 0.0)
    else:
        choice = None
    return _fit_als(config, ranks, model, settings, pair, before, choice)


def _fit_als(
    config: FactorizeConfig,
    ranks: Ranks,
    model: ALS,
    settings: ALSConfig | ALSParameters,
    pair: tuple[CSR, CSR],
    before: _Fitted | None,
    choice: MethodChoice | None,
) -> _Fitted:
    sweeps: list[tuple[float, float]] = []
    began = time.monotonic()
    with (
        _stop_on_interrupt("sweep") as stop_requested,
        Progress(
            "als" if before is None else "als, without the sample",
            "sweep",
            settings.sweeps or DEFAULTS["sweeps"],
            show=ranks.rank == 0,
            line_seconds=math.inf,  # each sweep prints a line
        ) as progress,
    ):

        def on_choice(choice: SettingsChoice) -> None:
            progress.write(choice.line())

        def on_sweep(report: SweepReport) -> bool:
            sweeps.append((report.objective, time.monotonic() - began))
            progress.stage(f"objective {report.objective:.6g}", report.sweep, report.sweeps)
            progress.write(
                f"sweep {report.sweep} of {report.sweeps}: objective {report.objective:.6g}, "
                f"{report.seconds:.2f} s, {report.eta:.0f} s left"
            )
            return stop_requested.is_set()

        model.on_choice = on_choice
        factors = model.fit(on_sweep, None if before is None else before.factors, pair)
        return _Fitted(factors, sweeps, config, model, choice)


def _protocol(als: ALSConfig, log: Log) -> ALSConfig:
    """The settings, with the automatic choice by the protocol of the log's held-out part."""
    if als.auto_metric != "auto":
        return als
    full = log.test_negatives is None and log.test is not None
    return replace(als, auto_metric="full" if full else "sampled")


@contextmanager
def _stop_on_interrupt(unit: str) -> Iterator[threading.Event]:
    """The first Ctrl-C (SIGINT) stops after this unit and keeps the factors; a second one interrupts."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals can be handled there alone
        yield requested
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        logger.info("SIGINT: stopping after this %s; once more to interrupt", unit)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)


def _read(
    config: FactorizeConfig, log: Log, ranks: Ranks, without: SampleConfig | None
) -> Iterator[tuple[Any, Any, Any]]:
    """Users, items and, with `use_label`, labels of the row groups of this rank."""
    schema = log.schema
    columns = [schema.user, schema.item] + ([schema.label] if config.use_label and schema.label else [])
    chunks = iter_columns(
        log.train, columns, rank=ranks.rank, world=ranks.world_size, sample=without, complement=without is not None
    )
    for data in chunks:
        yield data[schema.user], data[schema.item], data[columns[2]] if config.use_label else None


def _fit_logistic(config: FactorizeConfig, log: Log, ranks: Ranks) -> tuple[Factors, list[tuple[float, float]]]:
    from recpress.trainer.factorize.logistic import factorize_logistic  # imports torchrec, which als does not need

    began = time.monotonic()
    label = log.schema.label if config.use_label else None
    factors, losses = factorize_logistic(config.logistic, log, ranks, on_bad_file=config.on_bad_file, label=label)
    seconds = (time.monotonic() - began) / max(1, len(losses))
    if ranks.rank == 0:
        for epoch, loss in enumerate(losses, 1):
            logger.info("epoch %d of %d: mean cross-entropy %.6g", epoch, len(losses), loss)
    factors.user_counts, factors.item_counts = _counts(log, ranks)
    share_lost(log)
    return factors, [(loss, seconds * epoch) for epoch, loss in enumerate(losses, 1)]


def _counts(log: Log, ranks: Ranks) -> list[torch.Tensor]:
    """Rows of each user and of each item of this rank, float32. Uses 8 bytes per id on each rank."""
    found = []
    for side in SIDES:
        counts = torch.zeros(log.num_ids(side), dtype=torch.int64)
        with raise_on_all_ranks():
            for data in iter_columns(log.train, [log.column(side)], rank=ranks.rank, world=ranks.world_size):
                here = torch.from_numpy(np.bincount(data[log.column(side)]))
                counts[: len(here)] += here
        dist.all_reduce(counts)
        block = RowBlocks(log.num_ids(side), ranks.world_size)
        found.append(counts[block.start(ranks.rank) : block.stop(ranks.rank)].float())
    return found
