"""`recpress train`: log and factors -> a two-tower network, trained on a sample of the rows."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from recpress.data import artifact, storage
from recpress.data.errors import InputError
from recpress.data.log import Log
from recpress.data.negatives import PositivePairs, make_negatives
from recpress.data.order import ORDER_VERSION
from recpress.data.stream import InteractionStream
from recpress.modules.allocator import give_back
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts import MODEL, FactorsArtifact, describe_log, shared_artifact
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import Ranks, agreed, process_group, same_everywhere
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout, show
from recpress.trainer.hash.id_maps import SIDES, save_maps
from recpress.trainer.logs.damaged import open_on_all_ranks
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.two_tower import MAPS, WEIGHTS, Features, ShardedTwoTower, build, describe_model
from recpress.trainer.model.weights import save_weights
from recpress.trainer.train.follow import first_round
from recpress.trainer.train.inputs import choose_crossfit, choose_factors, choose_maps, has_heldout
from recpress.trainer.train.rows import make_batches, make_source, make_stream, stream_as_before, stream_stats
from recpress.trainer.versions import versions
from recpress.trainer.watch.metrics_log import MetricsLog
from recpress.trainer.watch.profiling import Profiler

if TYPE_CHECKING:
    from recpress.trainer.watch.prometheus import Endpoint
    from recpress.trainer.watch.rec_metrics import RecMetrics


@dataclass
class TrainResult:
    """What a training run did."""

    fit: FitResult
    metrics: dict[str, float]
    """Of the held-out rows, at the end; empty where the log has none."""
    rows: int
    """Rows of the sample, on all ranks."""
    setup_seconds: float
    """Opening, planning, sharding, loading factors."""
    table_bytes: int
    """Of all embedding tables as they are stored, scales included, optimizer states not."""
    map_bytes: int
    """Of the maps of ids, bit-packed; 0 where there are none, or where they follow from the id by a formula."""


def train(config: TrainConfig) -> TrainResult:
    """Train on `config.sample` of the log and write the model to `config.out`.

    While it runs, its checkpoints and metrics are beside it; a run with the same `out` goes on from them.

    Raises:
        InputError: log, factors or settings cannot be used; a loss is not finite; `out` exists. On every rank, and
            nothing is written but checkpoints.
        Preempted: a signal stopped the run, after a checkpoint.
    """
    with process_group(config.device, config.stall_seconds) as ranks, same_command_resumes():
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> TrainResult:
    """`train` within its process group, which outlives the model: see `process_group`."""
    begin = time.monotonic()
    same_everywhere(configuration=_digest(asdict(config)))
    only = first_round(config, _checkpoint_folder(config)) if config.follow.on else None
    skip = config.stream.on_bad_file == "skip"
    log = open_on_all_ranks(config.data, chosen_schema(config.schema), skip=skip, only=only)
    with agreed():
        factors = choose_factors(config, log)
        crossfit = choose_crossfit(config, log, factors)
        hashed = choose_maps(config, log, factors)
        maps: dict[str, IdMap] = {}
        if hashed is not None:
            maps = {side: hashed.map(side) for side in SIDES if side in hashed.maps}
        features = Features.of(log, config.user_features, config.item_features)
        stream = make_stream(config, log, ranks)
        model_config = describe_model(
            config.model, factors.dim if factors else None, config.user_features, config.item_features, [*maps]
        )
        artifact.check_target(config.out, config.overwrite)
        if log.is_part and config.sample.rate < 1 and ranks.rank == 0:
            print(
                f"{config.data} is a sample already, of which this trains on {stream.num_rows:,} of "
                f"{log.train.num_rows:,} rows; --sample.rate 1 takes all of it"
            )
    checkpoints = _checkpoints(config, log, stream, ranks)
    stream = stream_as_before(config, log, stream, checkpoints, ranks)
    with agreed():
        source = make_source(config, log, stream, ranks, maps)
    meta: dict[str, Any] = {"log": describe_log(log), "config": asdict(config), "model": model_config}
    if hashed is not None:
        meta["hash"] = hashed.describe()
    with checkpoints:
        model = _model(config, log, features, factors, maps, ranks)
        heldout = load_heldout(log, config.evaluation) if has_heldout(config, log, ranks) else None

        def put(of_sample: bool) -> None:
            """The tables that have not seen the sample, to train on; those of all rows, to rank with."""
            if factors is not None:
                with agreed():
                    model.load_factors(factors, crossfit=of_sample, hashed=hashed)

        def evaluate() -> dict[str, float]:
            if crossfit:
                put(False)
            model.dmp.eval()
            assert heldout is not None
            metrics = rank_heldout(
                heldout, model.vectors("user"), model.vectors("item"), config.evaluation, ranks.device
            )
            if crossfit:
                put(True)
            return metrics

        give_back()  # what reading the pairs took, before the tables come
        put(crossfit)
        give_back()
        setup_seconds = time.monotonic() - begin
        if ranks.rank == 0 and (config.tensorboard or storage.is_remote(checkpoints.folder)):
            viewer = "tensorboard --logdir " if config.tensorboard else ""
            print(f"metrics while it runs: {viewer}{checkpoints.metrics}", flush=True)
        with (
            _endpoint(config, checkpoints, ranks) as endpoint,
            MetricsLog(checkpoints.metrics, tensorboard=config.tensorboard, endpoint=endpoint) as metrics_log,
        ):
            fitted = fit(
                model.dmp,
                TrainOptimizer(model.dmp, config.optimizer, _total_steps(config, stream)),
                lambda epoch, step: make_batches(source.stream_of(epoch), model, epoch, step),
                _fit_config(config),
                device=ranks.device,
                evaluate=evaluate if heldout is not None else None,
                log=metrics_log,
                checkpoints=checkpoints,
                heart=ranks.heart,
                source=source,
                metrics=_rec_metrics(config, model, stream, ranks),
                profiler=_profiler(config, checkpoints, ranks),
                stream_stats=stream_stats(source),
            )
        if crossfit:
            put(False)
            crossfit = False
        metrics = evaluate() if heldout is not None else {}
        with shared_artifact(config.out, MODEL, meta, overwrite=config.overwrite) as tmp:
            (tmp / WEIGHTS).mkdir(exist_ok=True)
            save_weights(model.dmp, tmp / WEIGHTS)
            with agreed():
                if maps and ranks.rank == 0:
                    save_maps(maps, tmp / MAPS)
                if ranks.rank == 0:
                    shutil.copytree(checkpoints.metrics, tmp, dirs_exist_ok=True)
            table_bytes, map_bytes = sum(model.module.table_bytes.values()), sum(m.nbytes for m in maps.values())
            kept = int(all_reduce(torch.tensor(model.builder.negatives.kept_positives)))
            meta |= {
                "rows": source.num_rows,
                **source.describe(),
                "kept_positives": kept,
                "steps": fitted.steps,
                "skipped": fitted.skipped,
                "best": fitted.best,
                "metrics": metrics,
                "table_bytes": table_bytes,
                "tables": model.module.table_bytes,
                "map_bytes": map_bytes,
                "seconds": {"setup": setup_seconds, "train": fitted.train_seconds},
            }
        checkpoints.finish()
    if ranks.rank == 0:
        if kept:
            print(f"{kept:,} negatives were positives of their user, who has nearly all items")
        shown = show(metrics)
        print(f"{config.out}: {fitted.steps} steps in {fitted.train_seconds:.1f} s; {shown or 'no held-out rows'}")
        each = ", ".join(f"{name} {size:,}" for name, size in model.module.table_bytes.items())
        print(f"tables {table_bytes:,} bytes ({each})" + (f", maps {map_bytes:,} bytes" if maps else ""))
    return TrainResult(fitted, metrics, source.num_rows, setup_seconds, table_bytes, map_bytes)


def _total_steps(config: TrainConfig, stream: InteractionStream) -> int:
    """For the schedule and the time left; 0 where nobody knows."""
    return 0 if config.follow.on else stream.steps_per_epoch * config.epochs


def _model(
    config: TrainConfig,
    log: Log,
    features: Features,
    factors: FactorsArtifact | None,
    maps: Mapping[str, IdMap],
    ranks: Ranks,
) -> ShardedTwoTower:
    loss, kind = config.model.loss, config.negatives.kind
    with agreed():
        if kind == "in-batch" and not (loss.kind == "softmax" and loss.in_batch):
            raise InputError("negatives.kind is 'in-batch': expected model.loss.kind 'softmax' and model.loss.in_batch")
        counts = log.counts("item") if loss.in_batch or kind != "uniform" else None
        reject = None
        if config.negatives.reject_positives:
            reject = PositivePairs.of([log.train], log.schema.user, log.schema.item, log.num_items)
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
    with agreed():
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
    return Checkpoints(
        config.checkpoint,
        _checkpoint_folder(config),
        describe,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def _checkpoint_folder(config: TrainConfig) -> str:
    return config.checkpoint.folder or storage.beside(config.out, ".checkpoints")


@contextmanager
def _endpoint(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Iterator[Endpoint | None]:
    """The Prometheus endpoint, on rank 0, where one is asked for."""
    made: Endpoint | None = None
    with agreed():
        if config.watch.port and ranks.rank == 0:
            from recpress.trainer.watch.prometheus import Endpoint  # a run without one does not need its package

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
    from recpress.trainer.watch.rec_metrics import RecMetrics  # slow to import: torchmetrics

    return RecMetrics(config.metrics, model.module.loss, rows=stream.global_batch, device=ranks.device)


def _profiler(config: TrainConfig, checkpoints: Checkpoints, ranks: Ranks) -> Profiler | None:
    if not config.profile.steps:
        return None
    return Profiler(config.profile, checkpoints.metrics, ranks.device)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fit_config(config: TrainConfig) -> FitConfig:
    look = config.evaluation
    return FitConfig(
        epochs=min(config.stop_after or config.epochs, config.epochs),
        evaluate_every=look.every,
        evaluate_steps=look.every_steps,
        evaluate_first=look.while_training,
        metric=look.metric,
        patience=look.patience,
        on_nonfinite=config.on_nonfinite,
        keep_best=look.while_training,
    )
