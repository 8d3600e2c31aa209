"""The contrastive factorization of a log, with checkpoints that a stopped run resumes from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from recpress.data.dataset import object_store
from recpress.data.dataset.log import SIDES, Log
from recpress.modules.als.auto import Sample
from recpress.modules.als.factorization import ALS
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.als.interactions import CSR
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.auto import MethodChoice, choose
from recpress.modules.contrastive.factorization import Contrastive, EpochReport, Run, aligned
from recpress.trainer.artifacts.factors import claimed
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.checkpoint.staged import State
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.errors import Preempted
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.loop.stopping import StopSignal
from recpress.trainer.observability.progress import Progress
from recpress.trainer.versions import versions


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


def choose_method(
    config: FactorizeConfig, als: ALS, by_user: CSR, checkpoints: Checkpoints, metric: str
) -> tuple[FactorizeConfig, MethodChoice | None]:
    """(config with the method and all settings of `softmax`, what was compared). Collective.

    Args:
        als: the other method, if `auto` chooses one.
        by_user: interactions of this rank's users.
        checkpoints: a resumed run keeps the choice of the run before.
        metric: `sampled` or `full`, as in `ALSConfig.auto_metric`.
    """
    if checkpoints.start is not None:
        return replace(config, method="softmax", softmax=ContrastiveConfig(**checkpoints.start.run["settings"])), None
    settings = config.softmax
    if config.method == "softmax" and None not in (settings.temperature, settings.epochs):
        return config, None
    other = None
    if config.method == "auto":
        tried = als.choose(by_user)

        def other(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
            return als.prepare_sample(sample)(tried)

    choice = choose(settings, by_user, als.exchange, metric, other)
    return replace(config, method=choice.method, softmax=replace(settings, **choice.settings)), choice


def factorize_softmax(
    settings: ContrastiveConfig,
    log: Log,
    ranks: Ranks,
    interactions: tuple[CSR, CSR],
    checkpoints: Checkpoints,
    *,
    start: Factors | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[Factors, list[tuple[float, float]]]:
    """(factors, mean loss and seconds since the start for each epoch). Collective.

    Args:
        settings: all chosen.
        interactions: by user and by item, of this rank.
        start: initial factors, instead of random ones; the result is rotated to them.
        stop_requested: whether to stop after the epoch.

    Raises:
        InputError: the loss is not finite. On every rank.
        Preempted: SIGTERM or SIGUSR1 on any rank, after the epoch and its checkpoint. On every rank.
    """
    began = time.monotonic()
    run = Contrastive(settings, log.num_users, log.num_items, device=ranks.device).prepare(start, interactions)
    epochs: list[tuple[float, float]] = []
    if checkpoints.start is not None:
        checkpoints.start.load(_state(run), checkpoints.group)
        run.resume(checkpoints.start.run["position"])
        epochs = [tuple(epoch) for epoch in checkpoints.start.run["epochs"]]
        began -= epochs[-1][1] if epochs else 0.0
    description = "softmax" if start is None else "softmax, without the sample"
    with (
        StopSignal("epoch") as stop_signal,
        Progress(description, "epoch", run.epochs, show=ranks.rank == 0) as progress,
    ):
        progress.start_at(run.epoch)

        def on_epoch(report: EpochReport) -> bool:
            epochs.append((report.loss, time.monotonic() - began))
            progress.total = report.epochs
            progress.update(details=f"loss {report.loss:.4f}")
            if report.epoch == run.stopped:
                progress.write(
                    f"early stop: NDCG@10 of held-out examples {max(run.checks):.4f}, no better for "
                    f"{settings.patience} checks; {run.epochs - report.epoch} more epochs on all examples"
                )
            preempted = bool(run.exchange.max(int(stop_signal.name is not None)))
            if preempted or _is_due(checkpoints, report.epoch, run):
                about = {"position": run.position(), "epochs": epochs, "settings": asdict(settings)}
                checkpoints.save(_state(run), about, report.epoch)
            if preempted:
                checkpoints.wait()
                name, path = stop_signal.name or "a signal of another rank", checkpoints.last
                saved = f"rerun the same command to resume from {path}" if path else "no checkpoint could be written"
                raise Preempted(f"stopped by {name} after epoch {report.epoch}: {saved}")
            return stop_requested()

        run.train(on_epoch)
    found = run.factors()
    return found if start is None else aligned(found, start, run.exchange), epochs


def _is_due(checkpoints: Checkpoints, epoch: int, run: Run) -> bool:
    last = epoch == run.epochs and checkpoints.last is not None  # in a long run, cross-fitting follows
    return checkpoints.due(epoch) or bool(run.exchange.max(int(last or checkpoints.overdue())))


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
