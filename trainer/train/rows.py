"""The rows of a training run: the stream, what follows it in a log that grows, and the batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.data.sampling.selection import HoldOut
from recpress.data.stream.batch import Batch
from recpress.data.stream.stream import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.loop.source import Source
from recpress.trainer.model.two_tower import ShardedTwoTower
from recpress.trainer.train.follow import FollowedSource

logger = logging.getLogger(__name__)


def make_stream(
    config: TrainConfig,
    log: Log,
    ranks: Ranks,
    global_batch: int | None = None,
    hold_out: HoldOut | None = None,
) -> InteractionStream:
    """The stream of this rank.

    Args:
        global_batch: rows of a step on all ranks, where it is not by `batch_size`.
        hold_out: validation rows, which are not trained on.
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


def stream_as_before(
    config: TrainConfig, log: Log, stream: InteractionStream, checkpoints: Checkpoints, ranks: Ranks
) -> InteractionStream:
    """The stream of the run that goes on: where the number of ranks has changed, its global batch stays."""
    if checkpoints.start is None or checkpoints.start.manifest["global_batch"] == stream.global_batch:
        return stream
    rows = int(checkpoints.start.manifest["global_batch"])
    checkpoints.describe["global_batch"] = rows
    if ranks.rank == 0:
        per_rank = rows // ranks.world_size
        logger.warning("world size changed; keeping global batch size %s (%s per rank)", f"{rows:,}", f"{per_rank:,}")
    with raise_on_all_ranks():
        return make_stream(config, log, ranks, rows, stream.hold_out)


def make_source(
    config: TrainConfig, log: Log, stream: InteractionStream, ranks: Ranks, maps: Mapping[str, IdMap]
) -> Source:
    """What the loop takes rows from: the stream for all epochs, or rounds of the files of a log that grows."""
    if not config.follow.online:
        return Source(stream, log.bad_files)
    return FollowedSource(
        config,
        log,
        stream,
        lambda rows: make_stream(config, replace(log, train=rows), ranks, stream.global_batch),
        maps,
    )


def make_batches(stream: InteractionStream, model: ShardedTwoTower, epoch: int, step: int) -> Iterator[Batch]:
    """Made in the stream's thread; on CUDA not there: kernels belong to the pipeline's own CUDA stream."""
    stream.set_epoch(epoch, step)
    if model.builder.device.type == "cuda":
        return map(model.builder, stream)
    return stream.map(model.builder)


def stream_stats(source: Source) -> Callable[[], Mapping[str, float]] | None:
    """What the stream says of itself, where it does: its `stats()` has `as_dict()`, name -> number."""
    if not hasattr(source.stream, "stats"):
        return None
    return lambda: getattr(source.stream, "stats")().as_dict()  # noqa: B009 (streams need not have it)
