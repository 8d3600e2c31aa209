"""Opens the log of a stage on all ranks, and skips corrupt files and row groups with `on_bad_file skip`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from recpress.data.config import Schema
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.data.sampling.corrupt_groups import TolerantSplit, in_words, left_out
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks

logger = logging.getLogger(__name__)


def open_on_all_ranks(
    path: str, schema: Schema | None, *, skip: bool, pairs: bool = True, only: Sequence[str] | None = None
) -> Log:
    """The log. With `skip`, without files of train that any rank cannot open, and with a `TolerantSplit`. Collective.

    Args:
        pairs, only: see `open_log`.

    Raises:
        InputError: see `open_log`. On every rank.
    """
    with raise_on_all_ranks():
        log = open_log(path, schema, pairs=pairs, skip_bad=skip, only=only)
    if not skip:
        return _with_fingerprints(log)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, log.bad_files)
    bad = {path: why for of_rank in everyone for path, why in of_rank.items()}
    with raise_on_all_ranks():
        if any(of_rank.keys() != bad.keys() for of_rank in everyone):
            log = open_log(path, schema, pairs=pairs, skip_bad=True, bad=bad, only=only)
            if log.bad_files.keys() != bad.keys():
                raise InputError(f"{path}: files can be read at one moment and not at the next; try again later")
    return _with_fingerprints(replace(log, train=TolerantSplit.of(log.train)))


def _with_fingerprints(log: Log) -> Log:
    """The log with the fingerprints of its train files, which rank 0 computes and broadcasts. Collective."""
    if dist.get_world_size() > 1:
        taken: list[dict[str, str]] = [{}]
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                taken = [log.train.take_fingerprints()]
        dist.broadcast_object_list(taken)
        log.train.fingerprints.update(taken[0])
    return log


def share_lost(log: Log) -> None:
    """Merge what each rank could not read, for stages that read each row group on one rank. Collective.

    Raises:
        InputError: no row group could be read. On every rank.
    """
    if not isinstance(log.train, TolerantSplit):
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(log.train.lost))
    for of_rank in everyone:
        log.train.lost.update(of_rank)
    if len(log.train.lost) == len(log.train.groups):
        raise InputError(f"{log.path}: none of its {len(log.train.groups)} row groups can be read")


def describe_lost(log: Log) -> dict[str, Any]:
    """What a manifest says of it, once all is read; says so too, on rank 0. Nothing without `skip`."""
    found = left_out(log)
    if dist.get_rank() == 0 and (line := in_words(log)):
        logger.warning("%s", line)
    return found
