"""`recpress train`: log and factors -> a two-tower network, trained on a sample of the rows."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.data.negatives.negatives import InteractionSet, make_negatives
from recpress.data.stream.order import ORDER_VERSION
from recpress.data.stream.stream import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.allocator import malloc_trim
from recpress.trainer.artifacts.factors import MODEL, FactorsArtifact, claimed, describe_log, shared_artifact
from recpress.trainer.artifacts.id_maps import SIDES, save_maps
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import assert_same_across_ranks, raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout, show
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.two_tower import MAPS, WEIGHTS, Features, ShardedTwoTower, build, describe_model
from recpress.trainer.model.weights import save_weights
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.profiling import Profiler
from recpress.trainer.open_log import open_on_all_ranks
from recpress.trainer.train.choice import NOISE, Cases, Choice, paired_gain, warn
from recpress.trainer.train.follow import first_round
from recpress.trainer.train.inputs import choose_crossfit, choose_factors, choose_maps, choose_sample, has_heldout
from recpress.trainer.train.rows import make_batches, make_source, make_stream, stream_as_before, stream_stats
from recpress.trainer.train.validation import NoRows, ValidationRows, load_validation, plan_hold_out
from recpress.trainer.versions import versions

if TYPE_CHECKING:
    from recpress.trainer.observability.prometheus import Endpoint
    from recpress.trainer.observability.rec_metrics import RecMetrics

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run did."""

    fit: FitResult
    metrics: dict[str, float]
    """Of the held-out rows, at the end; empty where the log has none."""
    rows: int
    """Rows that were trained on, on all ranks; validation rows are not among them."""
    setup_seconds: float
    """Opening, planning, sharding, loading factors."""
    table_bytes: int
    """Of all embedding tables as they are stored, scales included, optimizer states not."""
    map_bytes: int
    """Of the maps of ids, bit-packed; 0 where there are none, or where they follow from the id by a formula."""
    factorization: dict[str, float] = field(default_factory=dict)
    """Metrics of the factors' own ranking of the same held-out rows; empty without factors."""
    validation: dict[str, Any] = field(default_factory=dict)
    """What chose the epoch (`Choice.describe`); empty where nothing did."""
    best_epoch: int | None = None
    """The epoch whose weights were published; 0: those before the first step; None: nothing was chosen."""
    fallback: bool = False
    """Whether the factorization's own ranking was published, because no epoch was better."""


def train(config: TrainConfig) -> TrainResult:
    """Train on `config.sample` of the log and write the model to `config.out`.

    With factors, the model that is written never ranks the validation rows worse than they do: where no epoch is better
    than the factorization, the factorization's own ranking is written. During the run its checkpoints and metrics are
    in folders next to `out`; a run with the same `out` resumes from them.

    Raises:
        InputError: log, factors or settings cannot be used; a loss is not finite; `out` exists. On every rank, and
            nothing is written but checkpoints.
        Preempted: a signal stopped the run, after a checkpoint.
    """
    with (
        process_group(config.device, config.stall_seconds) as ranks,
        claimed(config.out, _checkpoint_folder(config)),
        same_command_resumes(),
    ):
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> TrainResult:
    """`train` within its process group, which outlives the model: see `process_group`."""
    begin = time.monotonic()
    given, config = config, config.resolved()
    assert_same_across_ranks(configuration=_digest(asdict(config)))
    only = first_round(config, _checkpoint_folder(config)) if config.follow.online else None
    skip = config.stream.on_bad_file == "skip"
    log = open_on_all_ranks(config.data, chosen_schema(config.schema), skip=skip, only=only)
    with raise_on_all_ranks():
        factors = choose_factors(config, log)
        config = replace(config, sample=choose_sample(config, log, factors))
        crossfit = choose_crossfit(config, log, factors)
        hashed = choose_maps(config, log, factors)
        maps: dict[str, IdMap] = {}
        if hashed is not None:
            maps = {side: hashed.map(side) for side in SIDES if side in hashed.maps}
        features = Features.of(log, config.user_features, config.item_features)
        stream = make_stream(config, log, ranks, hold_out=plan_hold_out(config, log))
        model_config = describe_model(
            config.model, factors.dim if factors else None, config.user_features, config.item_features, [*maps]
        )
        artifact.check_target(
            config.out,
            config.overwrite,
            MODEL,
            [path for path in (config.data, config.factors, config.hash) if path],
        )
        if ranks.rank == 0:
            _say_settings(given, config, stream)
        if log.is_part and config.sample.rate < 1 and ranks.rank == 0:
            logger.info(
                f"{config.data} is a sample already, of which this trains on {stream.num_rows:,} of "
                f"{log.train.num_rows:,} rows; --sample.rate 1 takes all of it"
            )
    checkpoints = _checkpoints(config, log, stream, ranks)
    stream = stream_as_before(config, log, stream, checkpoints, ranks)
    with raise_on_all_ranks():
        source = make_source(config, log, stream, ranks, maps)
    # `config` is what was asked for, which `recpress pipeline` compares; `resolved` has all defaults filled in.
    meta: dict[str, Any] = {
        "log": describe_log(log),
        "config": asdict(given),
        "resolved": asdict(config),
        "model": model_config,
    }
    if hashed is not None:
        meta["hash"] = hashed.describe()
    with checkpoints:
        model = _model(config, log, features, factors, maps, ranks)
        heldout = load_heldout(log, config.evaluation) if has_heldout(config, log, ranks) else None
        found = load_validation(config, log, stream.hold_out, ranks, count_items=factors is None)
        rows = found if isinstance(found, ValidationRows) else None
        choice = Choice(rows.heldout, config.evaluation, ranks, rows.weights) if rows is not None else None
        unproven = isinstance(found, NoRows) and factors is not None
        if isinstance(found, NoRows):
            effect = (
                "so that no network can be shown to be better: trains none and keeps the factorization's ranking"
                if unproven
                else f"trains for {config.epochs} epochs, without a choice"
            )
            warn(
                f"{found.why}; {effect}. A larger --sample.rate or val part gives validation rows, and "
                "--evaluation.every 0 trains without"
            )

        def put(model: ShardedTwoTower, of_sample: bool) -> None:
            """The tables that have not seen the sample, to train on; those of all rows, to rank with."""
            if factors is not None:
                with raise_on_all_ranks():  # within it, no rank is in a collective that another one gave up
                    model.load_factors(factors, crossfit=of_sample, hashed=hashed)

        def as_factorization(of_sample: bool) -> ShardedTwoTower:
            """A network that ranks as the factors do, whatever `config` has for towers."""
            towers = replace(config.model.towers, kind="residual")
            like = _model(
                replace(config, model=replace(config.model, towers=towers)), log, features, factors, maps, ranks
            )
            put(like, of_sample)
            like.dmp.eval()
            return like

        malloc_trim()  # what reading the pairs took, before the tables come
        put(model, crossfit)
        malloc_trim()
        if choice is not None:
            assert rows is not None
            residual = config.model.towers.kind == "residual"
            if factors is not None:
                # Before `fit` loads a checkpoint, so that a resumed run compares with the same start.
                start = model if residual else as_factorization(crossfit)
                start.dmp.eval()
                choice.set_start(start.vectors("user"), start.vectors("item"))
                del start
                choice.seen = rows.source == "sample" and not crossfit
                if choice.seen:
                    warn(
                        "the factors have seen the validation rows, so that no network can be shown to be better: "
                        "trains none and keeps the factorization's ranking. For a network, make factors with "
                        "recpress factorize --crossfit-rate, or give the log a val part; --evaluation.every 0 trains "
                        "without validation"
                    )
            choice.set_popularity(_item_counts(factors, rows, crossfit))
        first = choice is not None and choice.start is not None and residual and checkpoints.start is None

        def evaluate() -> dict[str, float]:
            nonlocal first
            assert choice is not None
            if first:  # nothing is trained yet
                first = False
                return choice.evaluate_start()
            model.dmp.eval()
            return choice.evaluate(model.vectors("user"), model.vectors("item"))

        setup_seconds = time.monotonic() - begin
        if ranks.rank == 0 and (config.tensorboard or object_store.is_remote(checkpoints.folder)):
            viewer = "tensorboard --logdir " if config.tensorboard else ""
            logger.info(f"metrics while it runs: {viewer}{checkpoints.metrics}")
        with (
            _endpoint(config, checkpoints, ranks) as endpoint,
            MetricsLog(checkpoints.metrics, tensorboard=config.tensorboard, endpoint=endpoint) as metrics_log,
        ):
            fitted = fit(
                model.dmp,
                TrainOptimizer(model.dmp, config.optimizer, _total_steps(config, stream)),
                lambda epoch, step: make_batches(source.stream_of(epoch), model, epoch, step),
                _fit_config(config, nothing=unproven or (choice is not None and choice.seen)),
                device=ranks.device,
                evaluate=evaluate if choice is not None else None,
                accept=choice.accepts if choice is not None else None,
                log=metrics_log,
                checkpoints=checkpoints,
                source=source,
                metrics=_rec_metrics(config, model, stream, ranks),
                profiler=_profiler(config, checkpoints, ranks),
                stream_stats=stream_stats(source),
            )
        if crossfit:
            put(model, False)
        chosen = _chosen(choice, fitted, ranks)
        if unproven:
            chosen |= {"best_epoch": 0, "fallback": True}
        if chosen["fallback"] and config.model.towers.kind != "residual":
            model = as_factorization(False)
            towers = replace(config.model.towers, kind="residual")
            meta["model"] = model_config | {"two_tower": asdict(replace(config.model, towers=towers))}
        model.dmp.eval()
        metrics, factorization = _test(config, model, factors, heldout, ranks)
        with shared_artifact(config.out, MODEL, meta, overwrite=config.overwrite) as tmp:
            (tmp / WEIGHTS).mkdir(exist_ok=True)
            save_weights(model.dmp, tmp / WEIGHTS)
            with raise_on_all_ranks():
                if maps and ranks.rank == 0:
                    save_maps(maps, tmp / MAPS)
                if ranks.rank == 0:
                    shutil.copytree(checkpoints.metrics, tmp, dirs_exist_ok=True)
            table_bytes, map_bytes = sum(model.module.table_bytes.values()), sum(m.nbytes for m in maps.values())
            kept = int(all_reduce(torch.tensor(model.builder.negatives.kept_positives)))
            meta |= {
                "rows": source.num_rows,
                **source.describe(),
                "rejects_positives": model.builder.negatives.reject is not None,
                "kept_positives": kept,
                "steps": fitted.steps,
                "skipped": fitted.skipped,
                "best": fitted.best,
                **chosen,
                "metrics": metrics,
                "factorization_metrics": factorization,
                "table_bytes": table_bytes,
                "tables": model.module.table_bytes,
                "map_bytes": map_bytes,
                "seconds": {"setup": setup_seconds, "train": fitted.train_seconds},
            }
        checkpoints.finish()
    if ranks.rank == 0:
        if kept:
            logger.info(f"{kept:,} negatives were positives of their user, who has nearly all items")
        shown = show(metrics)
        print(f"{config.out}: {fitted.steps} steps in {fitted.train_seconds:.1f} s; {shown or 'no held-out rows'}")
        each = ", ".join(f"{name} {size:,}" for name, size in model.module.table_bytes.items())
        print(f"tables {table_bytes:,} bytes ({each})" + (f", maps {map_bytes:,} bytes" if maps else ""))
    return TrainResult(
        fitted,
        metrics,
        source.num_rows,
        setup_seconds,
        table_bytes,
        map_bytes,
        factorization=factorization,
        **chosen,
    )


def _say_settings(given: TrainConfig, config: TrainConfig, stream: InteractionStream) -> None:
    """What was chosen for the user, in one line."""
    share = "all rows" if config.sample.rate == 1 else f"{100 * config.sample.rate:g} % of the rows"
    start = f"factors {config.factors}" if config.factors else "random weights"
    left = [] if given.sample.rate else ["--sample.rate"]
    left += ["--model.tables.strategy"] if given.model.tables.strategy != config.model.tables.strategy else []
    logger.info(
        f"tables: {config.model.tables.strategy}, from {start}; {share}, {stream.num_rows:,} to train on; up to "
        f"{config.epochs} epochs" + (f" (chosen by default: {', '.join(left)})" if left else "")
    )


def _item_counts(factors: FactorsArtifact | None, rows: ValidationRows, crossfit: bool) -> torch.Tensor:
    """Rows of each item, (items, 1), validation rows excluded where that is known."""
    if rows.item_counts is not None:
        return torch.from_numpy(rows.item_counts).double()[:, None]
    assert factors is not None
    with raise_on_all_ranks():
        return torch.from_numpy(factors.counts("item", crossfit=crossfit)[:]).double()


def _chosen(choice: Choice | None, fitted: FitResult, ranks: Ranks) -> dict[str, Any]:
    """What the manifest says of the choice of an epoch; says it in one line, and warns where popularity is as good."""
    if choice is None or fitted.best is None:
        return {"best_epoch": None, "fallback": False, "validation": {}}
    best, metric = fitted.best, choice.metric
    fallback = choice.start is not None and best["step"] == 0
    tried = max(fitted.evaluations[1:], key=lambda found: found[metric], default=None)
    published = choice.start if fallback else best
    assert published is not None
    validation = choice.describe() | {"published": published[metric], "network": tried}
    cases = f"on {validation['cases']:,} validation rows"
    if fallback and ranks.rank == 0:
        assert choice.start is not None
        shown = ""
        if tried is not None:
            pairs = [f"{name} {tried[name]:.4f} against {choice.start[name]:.4f}" for name in _pair(choice)]
            shown = f" ({', '.join(pairs)})"
        said = f"the network did not improve on the factorization {cases}{shown}"
        logger.info(f"{'no network was trained' if tried is None else said}: the factorization's ranking is kept")
    elif choice.start is not None and ranks.rank == 0:
        pairs = [f"{name} {best[name]:.4f} against {choice.start[name]:.4f}" for name in _pair(choice)]
        epoch = int(best["epoch"])
        logger.info(f"the network improves on the factorization {cases}: {', '.join(pairs)} (epoch {epoch})")
    if published[metric] <= choice.popularity[metric]:
        cause = (
            "so do the factors: the log holds too little about tastes, or the settings of the factorization do not fit "
            "it (without --als options it chooses them)"
            if choice.start is not None and choice.start[metric] <= choice.popularity[metric]
            else "the network learned too little or too much by heart: give it --factors, more rows (--sample.rate 1) "
            "or more dropout"
        )
        warn(
            f"the model ranks no better than popularity {cases}: {metric} {published[metric]:.4f} against "
            f"{choice.popularity[metric]:.4f}; {cause}"
        )
    return {"best_epoch": int(best["epoch"]), "fallback": fallback, "validation": validation}


def _pair(choice: Choice) -> list[str]:
    assert choice.start is not None
    return [name for name in (choice.metric, choice.companion) if name in choice.start]


def _test(
    config: TrainConfig,
    model: ShardedTwoTower,
    factors: FactorsArtifact | None,
    heldout: SampledHeldout | FullHeldout | None,
    ranks: Ranks,
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the held-out part: of the network, and of the factors' own ranking; {} where there is none.

    Warns where the network is worse than the factors by more than noise. (Nothing was chosen on these rows.)
    """
    if heldout is None:
        return {}, {}
    cases: Cases = {}
    look, device = config.evaluation, ranks.device
    metrics = rank_heldout(heldout, model.vectors("user"), model.vectors("item"), look, device, cases)
    if factors is None:
        return metrics, {}
    with raise_on_all_ranks():
        user, item = (vectors_from_factors(factors.table(side)) for side in SIDES)
    own: Cases = {}
    factorization = rank_heldout(heldout, user, item, look, device, own)
    for name in (f"NDCG@{look.k[0]}", f"{'Recall' if isinstance(heldout, FullHeldout) else 'HR'}@{look.k[0]}"):
        gain, error = paired_gain(cases[name], own[name])
        if gain < -NOISE * error:
            compressed = config.hash is not None or config.model.tables.storage != "fp32"
            warn(
                f"on the held-out part the model is below the full factors: {name} {metrics[name]:.4f} against "
                f"{factorization[name]:.4f}" + (" (its tables are compressed)" if compressed else "")
            )
    return metrics, factorization


def _total_steps(config: TrainConfig, stream: InteractionStream) -> int:
    """For the schedule and the time left; 0 where nobody knows."""
    return 0 if config.follow.online else stream.steps_per_epoch * config.epochs


def _model(
    config: TrainConfig,
    log: Log,
    features: Features,
    factors: FactorsArtifact | None,
    maps: Mapping[str, IdMap],
    ranks: Ranks,
) -> ShardedTwoTower:
    loss, kind = config.model.loss, config.negatives.kind
    with raise_on_all_ranks():
        if kind == "in-batch" and not (loss.kind == "softmax" and loss.in_batch):
            raise InputError("negatives.kind is 'in-batch': expected model.loss.kind 'softmax' and model.loss.in_batch")
        counts = log.counts("item") if loss.in_batch or kind != "uniform" else None
        reject = None
        size = {"rows": log.train.num_rows, "users": log.num_users, "items": log.num_items}
        if config.negatives.rejects(**size, sample=config.sample):
            reject = InteractionSet.of([log.train], log.schema.user, log.schema.item, log.num_items)
        negatives = make_negatives(config.negatives, log.num_items, counts, reject)
    return build(
        config.model,
        log,
        features,
        ranks,
        dim=factors.dim if factors else None,
        negatives=negatives,
        shared_negatives=config.negatives.shared,
        item_counts=counts,
        batch_size=config.stream.batch_size,
        table_learning_rate=config.optimizer.table_learning_rate,
        seed=config.seed,
        maps=maps,
    )


def _checkpoints(config: TrainConfig, log: Log, stream: InteractionStream, ranks: Ranks) -> Checkpoints:
    """Where the state of this run is kept, and what must be the same when it goes on."""
    with raise_on_all_ranks():
        inputs = {"log": _digest([[file["size"], file["fingerprint"]] for file in log.inputs()])}
        inputs["order of the rows"] = str(ORDER_VERSION)
        inputs |= {f"{side} vocabulary": str(log.vocabulary_fingerprint(side)) for side in SIDES}
        for name, path in (("factors", config.factors), ("hash", config.hash)):
            if path is not None:
                inputs[name] = _digest(artifact.describe_folder(path))
        describe = {
            "versions": versions(),
            "config": asdict(config),
            "inputs": inputs,
            "global_batch": stream.global_batch,
        }
    return Checkpoints(config.checkpoint, _checkpoint_folder(config), describe)


def _checkpoint_folder(config: TrainConfig) -> str:
    return config.checkpoint.folder or object_store.beside(config.out, ".checkpoints")


@contextmanager
def _endpoint(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Iterator[Endpoint | None]:
    """The Prometheus endpoint, on rank 0, where one is asked for."""
    made: Endpoint | None = None
    with raise_on_all_ranks():
        if config.watch.port and ranks.rank == 0:
            from recpress.trainer.observability.prometheus import Endpoint

            made = Endpoint(config.watch.port, config.watch.address, lambda: checkpoints.failures)
    try:
        yield made
    finally:
        if made is not None:
            made.close()


def _rec_metrics(
    config: TrainConfig, model: ShardedTwoTower, stream: InteractionStream, ranks: Ranks
) -> RecMetrics | None:
    if not config.metrics.window:
        return None
    from recpress.trainer.observability.rec_metrics import RecMetrics  # slow to import: torchmetrics

    return RecMetrics(config.metrics, model.module.loss, rows=stream.global_batch, device=ranks.device)


def _profiler(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Profiler | None:
    if not config.profile.steps:
        return None
    return Profiler(config.profile, checkpoints.metrics, ranks.device)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fit_config(config: TrainConfig, *, nothing: bool) -> FitConfig:
    """`nothing`: no step is to be made."""
    look = config.evaluation
    return FitConfig(
        epochs=0 if nothing else min(config.stop_after or config.epochs, config.epochs),
        evaluate_every=look.every or 0,
        evaluate_steps=look.every_steps,
        evaluate_first=look.while_training,
        metric=look.metric,
        patience=look.patience,
        on_nonfinite=config.on_nonfinite,
        keep_best=look.while_training,
    )
