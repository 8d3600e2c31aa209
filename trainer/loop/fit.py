"""The train loop: TorchRec's pipeline, evaluation at intervals, early stopping, logs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recpress.data.errors import InputError
from recpress.data.seeds import key
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.allocator import RetainFreedMemory, malloc_trim
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.distributed.heartbeat import WAITING_FOR_DATA, heartbeat
from recpress.trainer.errors import Preempted
from recpress.trainer.loop import run_state
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.source import Source
from recpress.trainer.loop.stopping import Decisions, StopSignal
from recpress.trainer.model.weights import Snapshot
from recpress.trainer.observability.interval import Interval
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.profiling import Profiler
from recpress.trainer.observability.progress import Progress

if TYPE_CHECKING:
    from recpress.trainer.observability.rec_metrics import RecMetrics

_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/rows_per_second": "{:,.0f} rows/s",
    "train/waiting": "waiting {:.0%}",
    "train/ne": "NE {:.3f}",
    "train/auc": "AUC {:.3f}",
    "hash/unknown_users": "{:,.0f} unknown users",
    "hash/unknown_items": "{:,.0f} unknown items",
}
"""Scalars in the status line."""
Evaluate = Callable[[], Mapping[str, float]]
Batches = Callable[[int, int], Iterable[Any]]
"""(epoch, first step) -> the batches of the epoch from that step on; both are counted from 0."""


def fit(
    model: DistributedModelParallel,
    optimizer: TrainOptimizer,
    batches: Batches,
    config: FitConfig,
    *,
    device: torch.device,
    evaluate: Evaluate | None = None,
    log: MetricsLog | None = None,
    show_progress: bool = True,
    description: str = "train",
    checkpoints: Checkpoints | None = None,
    source: Source | None = None,
    metrics: RecMetrics | None = None,
    profiler: Profiler | None = None,
    stream_stats: Callable[[], Mapping[str, float]] | None = None,
    accept: Callable[[Mapping[str, float]], bool] | None = None,
) -> FitResult:
    """Train `model`, whose forward gives (loss, detached loss), on the batches of each epoch.

    With `checkpoints` it goes on from `checkpoints.start`, writes them as their configuration says, and stops on
    SIGTERM and SIGUSR1 with one more.

    Args:
        batches: the same number of batches on every rank; a batch has `label` (B,) and torchrec's `to`,
            `pin_memory` and `record_stream`.
        evaluate: metrics, the same on every rank; called with the model in eval mode and out of the pipeline.
        source: what the batches come from: kept in checkpoints, its scalars logged, asked for more at the end.
        metrics: of the rows that are trained on; logged with the losses and kept in checkpoints.
        profiler: of some steps.
        stream_stats: name -> value of the stream of this rank, logged as `stream/NAME`.
        accept: whether an evaluation after the first may be the best one; rank 0 decides. Patience counts
            evaluations without a larger metric, accepted or not.

    Raises:
        InputError: a loss is NaN or infinite; or the evaluation does not give `config.metric`.
        Preempted: a signal came; the checkpoint is written. On every rank, after the same step.
    """
    run = _Run(model, optimizer, config, device, evaluate, log, show_progress, description, checkpoints)
    run.source = source
    run.metrics, run.stream_stats, run.accept = metrics, stream_stats, accept
    profiled: AbstractContextManager[Any] = nullcontext()
    if profiler is not None:
        profiler.say, profiled = run.progress.write, profiler
    with StopSignal() if checkpoints is not None else nullcontext(run.signal) as run.signal:
        try:
            if checkpoints is not None:
                run.resume(checkpoints)
            with run.memory, profiled as run.profiler:
                run.run(batches)
        finally:
            run.progress.close()
            heartbeat.outside_step()
    return run.result


class _Run:
    def __init__(
        self,
        model: DistributedModelParallel,
        optimizer: TrainOptimizer,
        config: FitConfig,
        device: torch.device,
        evaluate: Evaluate | None,
        log: MetricsLog | None,
        show_progress: bool,
        description: str,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.evaluate_model, self.log = evaluate, log
        self.checkpoints = checkpoints
        self.memory = RetainFreedMemory(keep=device.type == "cpu")
        self.signal = StopSignal()
        self.decisions = Decisions() if checkpoints is not None else None
        self.result = FitResult()
        self.progress = Progress(
            description,
            total=optimizer.total_steps or None,
            show=show_progress and dist.get_rank() == 0,
            line_seconds=0,
        )
        # Without pipeline_postproc, lookups behind a map of ids would leave the pipeline, with a warning alone.
        mapped = any(isinstance(module, LearnedHash) for module in model.modules())
        self.pipeline = TrainPipelineSparseDist(
            model, optimizer, device, execute_all_batches=True, pipeline_postproc=mapped
        )
        if config.on_nonfinite == "skip":
            optimizer.skip_nonfinite = True
            for module in model.modules():
                if isinstance(module, TwoTower):
                    module.skip_nonfinite = True
        self.pending: list[torch.Tensor] = []
        self.taken: deque[int] = deque()  # rows of the batches that the pipeline has taken and not yet trained on
        self.best: Snapshot | None = None
        self.worse = 0
        self.peak = -math.inf
        """The largest metric of all evaluations, accepted or not."""
        self.accept: Callable[[Mapping[str, float]], bool] | None = None
        self.interval = Interval()
        self.marked_rows = 0
        self.metrics: RecMetrics | None = None
        self.profiler: Profiler | None = None
        self.stream_stats: Callable[[], Mapping[str, float]] | None = None
        self.epoch = 0
        self.step = 0
        """Steps of the epoch that are done."""
        self.source: Source | None = None
        self.labels = torch.zeros(())  # sum over the epoch
        self.kept = -1  # the step of the last checkpoint
        self.looked = False  # whether the evaluation before the first step is done

    def run(self, batches: Batches) -> None:
        if self.config.evaluate_first and not self.looked:
            self.evaluate()
        self.looked = True
        self.epoch = max(self.epoch, 1)
        while not self.out_of_patience() and self.has_next_epoch():
            stop = self.train_epoch(batches(self.epoch - 1, self.step))
            if not stop and self.config.evaluate_every and self.epoch % self.config.evaluate_every == 0:
                stop = self.evaluate()
            if stop:
                break
            self.epoch, self.step = self.epoch + 1, 0
        if self.checkpoints is not None and self.decisions is not None:
            stop = self.decisions.settle(stop=self.signal.name is not None)
            if stop or self.checkpoints.config.steps or self.checkpoints.config.minutes:
                self.save_checkpoint()  # a signal while the model is evaluated and written then costs no step
            if stop:
                self.stop()
        self.pipeline.detach()  # the model is used without a pipeline from here on
        if self.best is not None and self.config.keep_best:
            self.best.restore(self.model)

    def has_next_epoch(self) -> bool:
        """Whether there is another epoch; where the source grows, waits for one, or stops where a signal came."""
        if self.source is None or not self.source.grows or self.epoch <= self.config.epochs:
            return self.epoch <= self.config.epochs
        if self.source.known(self.epoch - 1):
            return True
        if self.checkpoints is not None and (self.checkpoints.config.steps or self.checkpoints.config.minutes):
            self.save_checkpoint()  # files may be long in coming
        heartbeat.outside_step()
        answer = self.source.wait(lambda: self.signal.name)
        if answer == "stop":
            self.save_checkpoint()
            self.stop()
        return answer == "round"

    def train_epoch(self, batches: Iterable[Any]) -> bool:
        """Whether to stop early."""
        self.model.train()
        iterator = self.track_batches(batches)
        self.interval.restart()
        self.marked_rows = self.result.rows
        from_its_start, self.labels = self.step == 0, torch.zeros(())
        stop = False
        while not stop:
            heartbeat.in_step(self.result.steps + 1, "in the step")
            try:
                loss = self.pipeline.progress(iterator)
            except StopIteration:
                break
            self.pending.append(loss)
            self.result.rows += self.taken.popleft()
            if self.source is not None:
                self.source.trained()
            self.result.steps += 1
            self.step += 1
            if self.metrics is not None:
                self.metrics.step()
            if self.result.steps % self.config.log_every == 0:
                self.flush()
            if self.config.evaluate_steps and self.result.steps % self.config.evaluate_steps == 0:
                self.flush()
                stop = self.evaluate()
            self.checkpoint()
            if self.profiler is not None:
                heartbeat.outside_step()
                with self.interval.pause(named=False):
                    self.profiler.step()
        heartbeat.outside_step()
        self.flush()
        if self.epoch == 1 and from_its_start and not stop:
            self.check_labels()
        if stop:  # batches that the pipeline has taken already are dropped
            self.pipeline.reset()
            self.taken.clear()
            if self.source is not None:
                self.source.drop()
        return stop

    def check_labels(self) -> None:
        """Raise InputError where nothing that was trained on has a label: such a loss says nothing."""
        total = torch.tensor([float(self.labels), float(self.step)])
        dist.all_reduce(total)
        if total[1] and not total[0]:
            raise InputError(
                "use_label: each row that was trained on has the label 0: there is nothing to learn; expected labels "
                "above 0 of positives, or no --use-label, which takes each row for a positive"
            )

    def checkpoint(self) -> None:
        """After a step: write a checkpoint where one is due, and stop where a signal came."""
        if self.checkpoints is None or self.decisions is None:
            return
        overdue = self.checkpoints.rank == 0 and self.checkpoints.overdue()
        stop, due = self.decisions.exchange(stop=self.signal.name is not None, checkpoint=overdue)
        if stop or due or self.checkpoints.due(self.result.steps):
            self.save_checkpoint()
        if stop:
            self.stop()

    def save_checkpoint(self) -> None:
        """Write a checkpoint, unless the last one is of this step."""
        if self.checkpoints is None or self.kept == self.result.steps:
            return
        self.flush()
        heartbeat.outside_step()
        state = run_state.everything(self.model, self.optimizer) | run_state.random_states(self.device)
        state |= self.metrics.state() if self.metrics is not None else {}
        with self.memory.usual():
            self.checkpoints.save(state, self.numbers(), self.result.steps)
        self.kept = self.result.steps

    def stop(self) -> None:
        """Raise Preempted, once the checkpoint is written."""
        assert self.checkpoints is not None
        assert self.decisions is not None
        self.checkpoints.wait()
        self.decisions.close()
        name, where = self.signal.name or "a signal of another rank", self.checkpoints.last
        kept = f"rerun the same command to resume from {where}" if where else "no checkpoint could be written"
        raise Preempted(f"stopped by {name} after step {self.result.steps}: {kept}")

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint says besides tensors; `resume` takes it."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "world": dist.get_world_size(),
            "worse": self.worse,
            "peak": None if math.isinf(self.peak) else self.peak,
            "best_step": None if self.best is None or self.result.best is None else int(self.result.best["step"]),
            "result": asdict(self.result),
            "source": None if self.source is None else self.source.state(),
        }

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        found = checkpoints.start
        if found is None:
            return
        numbers = found.run
        if found.best is not None and self.config.keep_best:
            found.best.load(run_state.weights(self.model), checkpoints.group)
            self.best = Snapshot.take(self.model)
        state, own = run_state.everything(self.model, self.optimizer), run_state.random_states(self.device)
        same = numbers["world"] == dist.get_world_size()
        watched = self.metrics.state() if self.metrics is not None and same else {}
        if not found.has(watched):  # written without metrics, or with another window
            watched = {}
        found.load(state | own | watched if same else state, checkpoints.group)
        if self.metrics is not None and watched:
            self.metrics.load(watched)
        if same:
            run_state.restore_random(own, self.device)
        else:  # there is no telling what another number of ranks would have drawn
            torch.manual_seed(key("resumed", torch.initial_seed(), numbers["result"]["steps"], dist.get_rank()) >> 64)
        self.result = FitResult(**numbers["result"])
        self.epoch, self.step, self.worse, self.looked = numbers["epoch"], numbers["step"], numbers["worse"], True
        self.peak = -math.inf if numbers.get("peak") is None else numbers["peak"]
        self.kept = self.result.steps
        if self.source is not None and numbers.get("source") is not None:
            self.source.restore(numbers["source"])
        self.optimizer.resume(self.result.steps)
        if self.log:
            self.log.cut(self.result.steps)
        self.progress.start_at(self.result.steps)
        self.progress.write(f"resuming from checkpoint {found.path} at step {self.result.steps}, epoch {self.epoch}")

    def track_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, as the pipeline takes them."""
        iterator = iter(batches)
        while True:
            heartbeat.in_step(self.result.steps + 1, WAITING_FOR_DATA)
            with self.interval.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            heartbeat.in_step(self.result.steps + 1, "in the step")
            self.taken.append(batch.label.shape[0])
            self.labels = self.labels.to(batch.label.device) + batch.label.detach().sum()
            if self.source is not None:
                self.source.take(batch)
            yield batch

    def flush(self) -> None:
        """Read the losses since the last time: the one place where the host waits for the device."""
        if not self.pending:
            return
        losses = torch.stack(self.pending).double()
        steps = len(self.pending)
        self.pending = []
        finite = torch.isfinite(losses).cpu()
        if not bool(finite.all()) and self.config.on_nonfinite == "stop":
            step = self.result.steps - steps + 1 + int((~finite).nonzero()[0])
            value = float(losses[step - 1 - self.result.steps + steps])
            raise InputError(
                f"non-finite loss {value} at step {step}, epoch {self.epoch}; lower the learning rate, or check "
                "labels, features and factors for NaN (--on-nonfinite skip skips such batches)"
            )
        kept = losses.cpu()[finite]
        seconds, waited = self.interval.end()
        waits = torch.zeros(dist.get_world_size(), dtype=torch.float64)
        waits[dist.get_rank()] = waited
        total = torch.tensor(
            [float(kept.sum()), float(len(kept)), float(steps - len(kept)), *waits], dtype=torch.float64
        )
        dist.all_reduce(total)
        loss = float(total[0] / total[1]) if total[1] else math.nan
        if total[2]:
            self.result.skipped += int(total[2])
            self.progress.write(
                f"steps {self.result.steps - steps + 1} to {self.result.steps}: skipped {int(total[2])} batches with a "
                f"non-finite loss, {self.result.skipped} in total"
            )
        rows, self.marked_rows = self.result.rows - self.marked_rows, self.result.rows
        self.result.train_seconds += seconds
        self.result.losses.append(loss)
        speed = rows * dist.get_world_size() / max(seconds, 1e-9)
        rate = self.optimizer.learning_rate
        scalars = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/rows_per_second": speed,
            "train/epoch": self.epoch,
            "train/waiting": float(total[3:].mean()),
            "train/waiting_slowest": float(total[3:].max()),
        }
        if self.metrics is not None:
            scalars |= {f"train/{name}": value for name, value in self.metrics.compute().items()}
        if self.stream_stats is not None:
            scalars |= {f"stream/{name}": float(value) for name, value in self.stream_stats().items()}
        if self.source is not None:
            scalars |= self.source.scalars()
        shown = (form.format(scalars[name]) for name, form in _SHOWN.items() if name in scalars)
        self.progress.update(steps, ", ".join(shown))
        if self.log:
            self.log.write(self.result.steps, scalars)

    def evaluate(self) -> bool:
        """Evaluate, remember the best; whether patience is over. Once a step."""
        seen = self.result.evaluations
        if self.evaluate_model is None or (seen and seen[-1]["step"] == self.result.steps):
            return False
        start = time.monotonic()
        heartbeat.outside_step()
        with self.interval.pause(), self.memory.usual():
            malloc_trim()  # what steps left, before the vectors of all users and items come
            self.pipeline.detach()
            self.model.eval()
            metrics = dict(self.evaluate_model())
            self.model.train()
            self.pipeline.attach()
        self.result.evaluate_seconds += time.monotonic() - start
        if self.config.metric not in metrics:
            known = ", ".join(metrics)
            raise InputError(f"metric {self.config.metric!r} is not among those of the evaluation: {known}")
        found = {
            **metrics,
            "step": self.result.steps,
            "epoch": self.epoch,
            "train_seconds": self.result.train_seconds,
        }
        self.result.evaluations.append(found)
        if self.log:
            self.log.write(self.result.steps, {f"evaluate/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.islower())
        self.progress.write(f"epoch {self.epoch}, step {self.result.steps}: {shown}")
        best = self.result.best
        accepted = best is None or self.accept is None or self.accept(found)
        decided = torch.tensor([metrics[self.config.metric], float(accepted)], dtype=torch.float64)
        dist.broadcast(decided, 0)  # the ranks must agree to the last bit on what is best
        value, accepted = float(decided[0]), bool(decided[1])
        if value > self.peak:
            self.peak, self.worse = value, 0
        else:
            self.worse += 1
        if accepted and value > (-math.inf if best is None else best[self.config.metric]):
            self.result.best = {**found, self.config.metric: value}
            if self.config.keep_best:
                self.best = Snapshot.take(self.model, self.best)
                if self.checkpoints is not None:
                    self.checkpoints.save(run_state.weights(self.model), {}, self.result.steps, best=True)
        return self.out_of_patience()

    def out_of_patience(self) -> bool:
        """Whether patience is."""
        return 0 < self.config.patience <= self.worse
