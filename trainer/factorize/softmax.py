"""The contrastive factorization of a log, with checkpoints that a stopped run resumes from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from recpress.data.dataset import object_store
from recpress.data.dataset.log import SIDES, Log
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import Contrastive, EpochReport, Run
from recpress.trainer.artifacts.factors import claimed
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.checkpoint.staged import State
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.observability.progress import Progress
from recpress.trainer.versions import versions

Rows = Callable[[], Iterator[tuple[Any, Any, Any]]]
"""Users, items and values (or None) of this rank's row groups."""


def open_checkpoints(config: FactorizeConfig, log: Log, until: ExitStack, part: str = "") -> Checkpoints:
    """The checkpoints of this run, next to its output. If `until` ends without an error, they are removed. Collective.

    Args:
        part: of a second factorization of the same run.

    Raises:
        InputError: the folder cannot be used, or has checkpoints of a run with other inputs. On every rank.
    """
    folder = config.checkpoint.folder or object_store.beside(config.out, ".checkpoints")
    folder = object_store.beside(folder, f".{part}") if part else folder
    inputs = {"log": json.dumps([[file["size"], file["fingerprint"]] for file in log.inputs()])}
    inputs |= {f"{side} vocabulary": str(log.vocabulary_fingerprint(side)) for side in SIDES}
    until.enter_context(claimed(folder))
    opened = until.enter_context(
        Checkpoints(config.checkpoint, folder, {"versions": versions(), "config": asdict(config), "inputs": inputs})
    )

    def finish(error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            opened.finish()

    until.push(finish)
    return opened


def factorize_softmax(
    settings: ContrastiveConfig,
    log: Log,
    ranks: Ranks,
    rows: Rows,
    checkpoints: Checkpoints | None,
    *,
    description: str = "softmax",
    start: Factors | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[Factors, list[tuple[float, float]]]:
    """(factors, mean loss and seconds since the start for each epoch). Collective.

    Args:
        start: initial factors, instead of random ones.
        stop_requested: whether to stop after the epoch.

    Raises:
        InputError: the log or the settings cannot be used; the loss is not finite.
    """
    began = time.monotonic()
    with raise_on_all_ranks():
        model = Contrastive(settings, log.num_users, log.num_items, device=ranks.device)
        for users, items, values in rows():
            model.add(users, items, values)
    run = model.prepare(start)
    epochs: list[tuple[float, float]] = []
    if checkpoints is not None and checkpoints.start is not None:
        checkpoints.start.load(_state(run), checkpoints.group)
        run.epoch, epochs = checkpoints.start.run["epoch"], [tuple(e) for e in checkpoints.start.run["epochs"]]
        began -= epochs[-1][1] if epochs else 0.0
    with Progress(description, "epoch", settings.epochs, show=ranks.rank == 0) as progress:
        progress.start_at(run.epoch)

        def on_epoch(report: EpochReport) -> bool:
            epochs.append((report.loss, time.monotonic() - began))
            progress.update(details=f"loss {report.loss:.4f}")
            if checkpoints is not None and _is_due(checkpoints, report.epoch, run):
                checkpoints.save(_state(run), {"epoch": report.epoch, "epochs": epochs}, report.epoch)
            return stop_requested()

        run.train(on_epoch)
    return run.factors(), epochs


def _is_due(checkpoints: Checkpoints, epoch: int, run: Run) -> bool:
    last = epoch == run.config.epochs and checkpoints.last is not None  # in a long run, cross-fitting follows
    return last or checkpoints.due(epoch) or bool(run.exchange.max(int(checkpoints.overdue())))


def _state(run: Run) -> State:
    """Vectors and optimizer states, sharded as the run. To load into them changes the run."""
    found: State = {}
    for side, adam, count in (("user", run.users, run.num_users), ("item", run.items.adam, run.num_items)):
        for name in ("rows", "momentum", "second"):
            local = getattr(adam, name)
            first = RowBlocks(count, run.exchange.world).start(run.exchange.rank)
            shards = [Shard.from_tensor_and_offsets(local, [first, 0], dist.get_rank())] if len(local) else []
            found[f"{side}.{name}"] = ShardedTensor._init_from_local_shards(shards, [count, local.shape[1]])
    return found
