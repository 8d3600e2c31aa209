"""`recpress train --model`: a log with labels -> any model, with the same loop, checkpoints and metrics as the
two-tower network."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import iter_row_groups
from recpress.data.errors import InputError
from recpress.data.sampling.selection import HoldOut, Selection
from recpress.data.stream.loader import InteractionStream
from recpress.trainer.artifacts.factors import MODEL, claimed, describe_log, shared_artifact
from recpress.trainer.artifacts.id_maps import HashArtifact, open_maps, save_maps
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import assert_same_across_ranks, raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.labelled import Chunk, evaluate_rows, held_out_rows, part_rows
from recpress.trainer.evaluate.stage import show_predictions
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.feature_set import FeatureSet
from recpress.trainer.features.id_space import table_spaces
from recpress.trainer.features.resolve import open_with_features, resolve_features
from recpress.trainer.features.sampled_rows import sampled_rows
from recpress.trainer.features.tables import vocabulary_of
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.precision import check_precision
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.model.table_optimizers import check_table_optimizer
from recpress.trainer.model.trained import ShardedModel, build_model
from recpress.trainer.model.two_tower import MAPS, WEIGHTS
from recpress.trainer.model.weights import save_weights
from recpress.trainer.train.config import TrainModelConfig
from recpress.trainer.train.resume import checkpoint_folder, digest, keep_global_batch, open_checkpoints
from recpress.trainer.train.run import run_fit
from recpress.trainer.train.warm_start import NewTable, describe_spaces, earlier_numbers, warm_start

logger = logging.getLogger(__name__)

LEAST, MOST = 2_000, 500_000
"""At least and at most this many validation rows; a tenth of the sample between them."""
SHARE, LARGEST_SHARE = 0.1, 0.2
TOO_FEW = 100
"""A sample with fewer rows has no validation rows."""


@dataclass(frozen=True)
class TrainModelResult:
    """What a training run did."""

    fit: FitResult
    metrics: dict[str, float]
    """Of the `test` part; empty if the log has none."""
    validation: dict[str, float]
    """Of the published weights on the validation rows; empty without such rows."""
    rows: int
    """Rows that were trained on, on all ranks, without validation rows."""
    setup_seconds: float
    table_bytes: int
    """Of all embedding tables as stored, without optimizer states."""
    map_bytes: int
    """Of the id maps, bit-packed."""


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, opened and checked."""

    log: Log
    label: str
    features: FeatureSet
    maps: HashArtifact | None
    columns: list[str]
    """Of the log, with the label."""


def train_model(config: TrainModelConfig) -> TrainModelResult:
    """Train `config.factory` on `config.sample` of the log and write the model to `config.out`.

    Raises:
        InputError: log, features, model or settings cannot be used; a loss is not finite; `out` exists. On every rank;
            nothing is written but checkpoints.
        Preempted: a signal stopped the run, after a checkpoint.
    """
    with (
        process_group(config.device, config.stall_seconds) as ranks,
        claimed(config.out, checkpoint_folder(config)),
        same_command_resumes(),
    ):
        return _train(config, ranks)


def _train(config: TrainModelConfig, ranks: Ranks) -> TrainModelResult:
    """`train_model` within its process group, which must outlive the model: see `process_group`."""
    start = time.monotonic()
    assert_same_across_ranks(configuration=digest(asdict(config)))
    with raise_on_all_ranks():
        check_precision(config.precision, ranks.device)
        check_table_optimizer(config.optimizer.tables, ranks.device.type)
    inputs = _open(config)
    log, features = inputs.log, inputs.features
    held = hold_out(config, log)
    stream: InteractionStream | None = None
    with raise_on_all_ranks():
        stream = _stream(config, inputs, ranks, held)
    assert stream is not None
    artifacts = {"maps": config.maps} | {f"factors of {t.name}": t.frozen.path for t in features.tables if t.frozen}
    with open_checkpoints(config, log, stream.global_batch, artifacts, features=features.describe()) as checkpoints:
        stream = keep_global_batch(stream, checkpoints, ranks, lambda rows: _stream(config, inputs, ranks, held, rows))
        model = build_model(
            config.factory,
            config.model,
            features,
            ranks,
            batch_size=config.stream.batch_size,
            learning_rate=config.optimizer.table_learning_rate,
            optimizer=config.optimizer.tables,
            seed=config.seed,
            communication=config.communication,
        )
        described = _describe(config, inputs, model)
        checkpoints.describe |= described  # a later run may start from a checkpoint, too
        if config.warm_start is not None and checkpoints.start is None:
            _warm_start(config, inputs, model)
        validation = _validation(config, inputs, stream, ranks)
        if ranks.rank == 0:
            _log_settings(config, inputs, stream, validation is not None)
        setup_seconds = time.monotonic() - start
        data = TrainingData(stream, log.bad_files)
        fitted = _fit(config, inputs, model, data, validation, checkpoints, ranks)
        model.dmp.eval()
        metrics = _test(config, inputs, model, ranks)
        best = {name: value for name, value in (fitted.best or {}).items() if not name.islower()}
        maps = {table.name: table.id_map for table in features.tables if table.id_map is not None}
        map_bytes = sum(id_map.nbytes for id_map in maps.values())
        manifest = {
            "log": describe_log(log),
            "config": asdict(config),
            **described,
            "rows": data.num_rows,
            **data.describe(),
            "steps": fitted.steps,
            "best": fitted.best,
            "best_epoch": int(fitted.best["epoch"]) if fitted.best else None,
            "validation": best,
            "metrics": metrics,
            "table_bytes": sum(model.table_bytes.values()),
            "tables": model.table_bytes,
            "map_bytes": map_bytes,
            "seconds": {"setup": setup_seconds, "train": fitted.train_seconds},
        }
        with shared_artifact(config.out, MODEL, manifest, overwrite=config.overwrite) as folder:
            (folder / WEIGHTS).mkdir(exist_ok=True)
            save_weights(model.dmp, folder / WEIGHTS)
            with raise_on_all_ranks():
                if ranks.rank == 0:
                    if maps:
                        save_maps(maps, folder / MAPS)
                    shutil.copytree(checkpoints.metrics, folder, dirs_exist_ok=True)
        checkpoints.finish()
    if ranks.rank == 0:
        measured = (("test", metrics), ("validation", best))
        shown = next((f"{part} {show_predictions(found)}" for part, found in measured if found), "no held-out rows")
        print(f"{config.out}: {fitted.steps} steps in {fitted.train_seconds:.1f} s; {shown}")
        sizes = f"tables {sum(model.table_bytes.values()):,} bytes"
        print(sizes + (f", maps {map_bytes:,} bytes" if maps else ""))
    return TrainModelResult(
        fitted, metrics, best, data.num_rows, setup_seconds, sum(model.table_bytes.values()), map_bytes
    )


def _open(config: TrainModelConfig) -> _Inputs:
    """Open the log and resolve the features. Collective."""
    skip = config.stream.on_bad_file == "skip"
    log = open_with_features(config.data, chosen_schema(config.schema), config.features, skip=skip)
    label, maps, earlier = log.schema.label, None, None
    with raise_on_all_ranks():
        if not label:
            raise InputError(f"{log.path}: no label; expected --schema.label, a column of 0 and 1, or of ratings")
        maps = open_maps(config.maps, log) if config.maps else None
        sources = [path for path in (config.data, config.maps, config.warm_start) if path]
        artifact.check_target(config.out, config.overwrite, MODEL, sources)
        earlier = earlier_numbers(config)
    assert label
    assert earlier is not None
    features = resolve_features(log, config.features, maps=maps, dim=config.dim, label=label, earlier=earlier)
    inputs = _Inputs(log, label, features, maps, [label, *features.columns(log)])
    with raise_on_all_ranks():
        builder = FeatureBatches(features, log, label, config.label_threshold)
        _check_labels(log, builder)
    return inputs


def _describe(config: TrainModelConfig, inputs: _Inputs, model: ShardedModel) -> dict[str, Any]:
    """Entries of a manifest about the model and what the rows of its tables are of."""
    log, features = inputs.log, inputs.features
    spaces = table_spaces(log, features, model.table_features)
    numbered = {f.name: found for f in features.features if (found := vocabulary_of(log, f)) is not None}
    model_entry = {"name": config.factory, "options": asdict(config.model), **features.describe()}
    return {
        "model": {**model_entry, "vocabularies": numbered},
        "ids": describe_spaces(log, spaces),
    }


def _warm_start(config: TrainModelConfig, inputs: _Inputs, model: ShardedModel) -> None:
    features = inputs.features
    maps = {table.name: table.id_map for table in features.tables}
    spaces = table_spaces(inputs.log, features, model.table_features)
    tables = {name: NewTable(space, maps.get(name)) for name, space in spaces.items()}
    warm_start(config, model.dmp, inputs.log, tables, features.keys, features.floats)


def _check_labels(log: Log, builder: FeatureBatches) -> None:
    """Raise InputError, on rank 0, if train has one label only. Reads all of train only if a sample of it has one."""
    if dist.get_rank():
        return
    seen: set[float] = set()
    for rows in sampled_rows(log, [builder.label]):
        seen.update(builder.labels(torch.from_numpy(np.array(rows[builder.label]))).unique().tolist())
    if len(seen) > 1:
        return
    for _, rows in iter_row_groups(log.train, [builder.label]):
        seen.update(builder.labels(torch.from_numpy(np.array(rows[builder.label]))).unique().tolist())
        if len(seen) > 1:
            return
    if seen:
        threshold = "makes labels of ratings" if builder.threshold is None else f"{builder.threshold:g} is out of range"
        raise InputError(
            f"{log.path}, column '{builder.label}': the label of each row is {seen.pop():g}, expected 0 and 1; "
            f"--label-threshold {threshold}"
        )


def hold_out(config: TrainModelConfig, log: Log) -> HoldOut | None:
    """Which rows of the sample are held out; None: none. A pure function of the files and the configuration."""
    evaluation = config.evaluation
    if not evaluation.while_training or (evaluation.source == "auto" and log.val is not None):
        return None
    count = Selection(log.train, config.sample).num_rows
    if count < TOO_FEW:
        return None
    return HoldOut(rate=min(LARGEST_SHARE, max(SHARE, LEAST / count), MOST / count), seed=config.sample.seed)


def _stream(
    config: TrainModelConfig, inputs: _Inputs, ranks: Ranks, held: HoldOut | None, global_batch: int | None = None
) -> InteractionStream:
    return InteractionStream(
        inputs.log.train,
        inputs.log.schema,
        config.stream,
        sample=config.sample,
        hold_out=held,
        rank=ranks.rank,
        world=ranks.world_size,
        global_batch=global_batch,
        columns=inputs.columns,
    )


def _validation(
    config: TrainModelConfig, inputs: _Inputs, stream: InteractionStream, ranks: Ranks
) -> list[Chunk] | None:
    """The validation rows of this rank; None if there are none on any rank. Collective."""
    log, rows = inputs.log, None
    with raise_on_all_ranks():
        if stream.hold_out is not None:
            selection = Selection(log.train, config.sample, hold_out=stream.hold_out)
            rows = held_out_rows(selection, log.train, inputs.columns, ranks)
        elif config.evaluation.while_training and log.val is not None:
            _check_columns("val", log, inputs)
            rows = list(part_rows(log.val, inputs.columns, ranks, MOST, config.sample.seed))
    return rows


def _check_columns(part: str, log: Log, inputs: _Inputs) -> None:
    rows = log.val if part == "val" else log.test
    assert rows is not None
    if missing := [name for name in inputs.columns if name not in rows.columns]:
        raise InputError(
            f"{log.path}: its {part} part has no column '{missing[0]}', which train has; expected it for the "
            "evaluation (--evaluation.source sample takes validation rows from train)"
        )


def _fit(
    config: TrainModelConfig,
    inputs: _Inputs,
    model: ShardedModel,
    data: TrainingData,
    validation: list[Chunk] | None,
    checkpoints: Any,
    ranks: Ranks,
) -> FitResult:
    evaluation, stream = config.evaluation, data.stream
    pin = ranks.device.type == "cuda"
    builder = FeatureBatches(inputs.features, inputs.log, inputs.label, config.label_threshold, pin_memory=pin)

    def batches(epoch: int, step: int) -> Iterator[Batch]:
        stream.set_epoch(epoch, step)
        return stream.map(builder)

    def evaluate() -> dict[str, float]:
        assert validation is not None
        return evaluate_rows(model.dmp, validation, builder, ranks, config.stream.batch_size)

    metrics = None
    if config.metrics.window:
        from recpress.trainer.observability.rec_metrics import RecMetrics  # slow to import: torchmetrics

        metrics = RecMetrics(config.metrics, model.module, rows=stream.global_batch, device=ranks.device)
    total_steps = config.total_steps(stream.steps_per_epoch, config.epochs)
    return run_fit(
        config,
        model.dmp,
        TrainOptimizer(model.dmp, config.optimizer, total_steps, ema=config.ema),
        batches,
        FitConfig(
            epochs=min(config.stop_after or config.epochs, config.epochs),
            accumulate=config.accumulate,
            precision=config.precision,
            evaluate_every=evaluation.every if validation is not None else 0,
            evaluate_steps=evaluation.every_steps if validation is not None else 0,
            evaluate_first=validation is not None and config.warm_start is not None,  # training may not improve it
            metric=evaluation.metric,
            smaller_is_better=evaluation.metric != "AUC",
            patience=evaluation.patience,
            keep_best=validation is not None,
        ),
        checkpoints=checkpoints,
        ranks=ranks,
        data=data,
        evaluate=evaluate if validation is not None else None,
        metrics=metrics,
    )


def _test(config: TrainModelConfig, inputs: _Inputs, model: ShardedModel, ranks: Ranks) -> dict[str, float]:
    """Metrics of the test part; {} if there is none with labels. Collective."""
    log = inputs.log
    if log.test is None:
        return {}
    if inputs.label not in log.test.columns:
        if ranks.rank == 0:
            logger.info(f"{log.path}: its test part has no column '{inputs.label}', so that nothing is measured on it")
        return {}
    builder = FeatureBatches(inputs.features, log, inputs.label, config.label_threshold)
    with raise_on_all_ranks():
        _check_columns("test", log, inputs)
    return evaluate_rows(
        model.dmp, part_rows(log.test, inputs.columns, ranks), builder, ranks, config.stream.batch_size
    )


def _log_settings(config: TrainModelConfig, inputs: _Inputs, stream: InteractionStream, validated: bool) -> None:
    features = inputs.features
    share = "all rows" if config.sample.rate == 1 else f"{100 * config.sample.rate:g} % of the rows"
    logger.info(
        f"{config.factory}: {len(features.keys)} features in {len(features.tables)} tables, {len(features.floats)} "
        f"floats; {share}, {stream.num_rows:,} to train on; up to {config.epochs} epochs"
    )
    if stream.hold_out is not None and any(table.frozen is not None for table in features.tables):
        logger.warning(
            "the factors of frozen tables may have seen the validation rows, which are held out of train: then their "
            "metrics are optimistic. A val part that was not factorized avoids that"
        )
    if config.evaluation.while_training and not validated:
        logger.warning(
            f"too few rows to hold validation rows out: training for all {config.epochs} epochs, without a choice"
        )
