"""The training data of a run: the stream of examples, and the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.data.sampling.selection import HoldOut
from recpress.data.stream.batch import Batch
from recpress.data.stream.loader import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.model.two_tower import ShardedTwoTower
from recpress.trainer.train.online import OnlineData


def make_stream(
    config: TrainConfig,
    log: Log,
    ranks: Ranks,
    global_batch: int | None = None,
    hold_out: HoldOut | None = None,
) -> InteractionStream:
    """The stream of this rank.

    Args:
        global_batch: rows of a step on all ranks; default: `batch_size` per rank.
        hold_out: validation rows, which the stream skips.
    """
    columns = [log.schema.user, log.schema.item]
    if config.use_label:
        if not log.schema.label:
            raise InputError("use_label: expected schema.label, a column of labels in [0, 1]")
        columns.append(log.schema.label)
    return InteractionStream(
        log.train.with_labels_in(log.schema.label, 0, 1) if config.use_label and log.schema.label else log.train,
        log.schema,
        config.stream,
        sample=config.sample,
        hold_out=hold_out,
        rank=ranks.rank,
        world=ranks.world_size,
        global_batch=global_batch,
        columns=columns,
        pin_memory=ranks.device.type == "cuda",
    )


def training_data(
    config: TrainConfig, log: Log, stream: InteractionStream, ranks: Ranks, maps: Mapping[str, IdMap]
) -> TrainingData:
    """The stream for all epochs; or, for online training, also the rounds of new files."""
    if not config.follow.online:
        return TrainingData(stream, log.bad_files)
    return OnlineData(
        config,
        log,
        stream,
        lambda rows: make_stream(config, replace(log, train=rows), ranks, stream.global_batch),
        maps,
    )


def make_batches(stream: InteractionStream, model: ShardedTwoTower, epoch: int, step: int) -> Iterator[Batch]:
    """The batches of an epoch from a step on, built in the stream's thread.

    On CUDA the main thread builds them, because their kernels belong to the CUDA stream of the pipeline.
    """
    stream.set_epoch(epoch, step)
    builder = model.builder.for_training()
    return map(builder, stream) if builder.device.type == "cuda" else stream.map(builder)
