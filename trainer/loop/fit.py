"""The train loop of any sharded model, in execution order.

fit
  resume                   load the newest checkpoint
  for each epoch:
    train_epoch
      for each step:
        train_step         `accumulate` calls of TorchRec's TrainPipelineSparseDist, with three batches in flight
                             batch i + 2: get the batch, copy it to the device
                             batch i + 1: all-to-all of the ids to the ranks that hold their embedding rows
                             batch i:     lookup, all-to-all of the vectors, forward and loss, backward with the fused
                                          optimizer of the tables
                           at the last: all-reduce of the dense gradients, dense optimizer
        log_interval       every `log_every` steps: mean loss, rows/s, metrics
        evaluate           every `evaluate_steps` steps and `evaluate_every` epochs; keeps the best weights
        save_checkpoint    if due, and before a stop by a signal
  restore the best weights
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.data.errors import InputError
from recpress.modules.id_check import check_ids
from recpress.trainer.allocator import RetainFreedMemory, malloc_trim
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.distributed.heartbeat import WAITING_FOR_DATA, heartbeat
from recpress.trainer.errors import Preempted
from recpress.trainer.loop import run_state
from recpress.trainer.loop.best import BestModel
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.out_of_memory import in_step
from recpress.trainer.loop.precision import matmul_precision
from recpress.trainer.loop.step import StepPipeline
from recpress.trainer.loop.stopping import DelayedFlags, StopSignal
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.observability.interval import Interval
from recpress.trainer.observability.metrics_log import MetricsLog, status_line
from recpress.trainer.observability.profiling import Profiler
from recpress.trainer.observability.progress import Progress

if TYPE_CHECKING:
    from recpress.trainer.observability.rec_metrics import RecMetrics

Evaluate = Callable[[], Mapping[str, float]]
Batches = Callable[[int, int], Iterable[Any]]
"""(epoch, position) -> the batches of the epoch from this one on. Both count from 0."""
logger = logging.getLogger(__name__)


def fit(
    model: DistributedModelParallel,
    optimizer: TrainOptimizer,
    batches: Batches,
    config: FitConfig,
    *,
    device: torch.device,
    evaluate: Evaluate | None = None,
    accept: Callable[[Mapping[str, float]], bool] | None = None,
    checkpoints: Checkpoints | None = None,
    data: TrainingData | None = None,
    log: MetricsLog | None = None,
    metrics: RecMetrics | None = None,
    profiler: Profiler | None = None,
    show_progress: bool = True,
    description: str = "train",
) -> FitResult:
    """Train `model`, whose forward returns (loss, detached loss), on the batches of each epoch. Collective.

    With `checkpoints` the run resumes from `checkpoints.start`, saves checkpoints as configured, and on SIGTERM or
    SIGUSR1 saves one more and stops.

    Args:
        batches: the same number of batches on every rank; a batch has `labels` (B,) and torchrec's `to`,
            `pin_memory` and `record_stream`.
        evaluate: returns metrics, the same on every rank; called with the model in eval mode, outside of the pipeline.
        accept: whether an evaluation after the first may be the best one; rank 0 decides. Patience counts all
            evaluations without a larger metric, accepted or not.
        data: source of the batches. Its state is part of checkpoints, its scalars are logged, and it may add epochs.
        log: destination of the scalars.
        metrics: of the rows that are trained on; logged, and part of checkpoints.
        profiler: profiles some steps.

    Raises:
        InputError: a loss is NaN or infinite; or the evaluation does not return `config.metric`.
        Preempted: stopped by a signal, after a checkpoint. On every rank, after the same step.
    """
    loop = TrainLoop(model, optimizer, config, device)
    loop.evaluate_model, loop.accept, loop.data = evaluate, accept, data
    loop.log, loop.metrics, loop.profiler = log, metrics, profiler
    loop.progress = Progress(
        description, total=optimizer.total_steps or None, show=show_progress and dist.get_rank() == 0, line_seconds=0
    )
    with StopSignal() if checkpoints is not None else nullcontext(loop.signal) as loop.signal:
        try:
            if checkpoints is not None:
                loop.checkpoints, loop.flags = checkpoints, DelayedFlags()
                loop.resume(checkpoints)
            products = matmul_precision("high") if config.precision == "tf32" else nullcontext()
            with loop.memory, products, profiler or nullcontext():
                loop.run(batches)
        finally:
            loop.progress.close()
            heartbeat.outside_step()
    return loop.result


class TrainLoop:
    """State of a run of `fit`."""

    evaluate_model: Evaluate | None = None
    accept: Callable[[Mapping[str, float]], bool] | None = None
    checkpoints: Checkpoints | None = None
    flags: DelayedFlags | None = None
    data: TrainingData | None = None
    log: MetricsLog | None = None
    metrics: RecMetrics | None = None
    profiler: Profiler | None = None

    def __init__(
        self, model: DistributedModelParallel, optimizer: TrainOptimizer, config: FitConfig, device: torch.device
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.pipeline = StepPipeline(model, optimizer, config, device)
        self.result = FitResult()
        self.best = BestModel(config)
        self.epoch = 0  # from 1 once training has begun
        self.position = 0  # batches of the epoch that are done
        self.evaluated_first = False
        self.label_sum = torch.zeros(())  # of the epoch
        self.interval = Interval()
        self.saved_step = -1  # of the last checkpoint
        self.signal = StopSignal()
        self.memory = RetainFreedMemory(device.type == "cpu")
        self.progress = Progress("train", show=False)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Restore the state of the newest complete checkpoint, if there is one."""
        found = checkpoints.start
        if found is None:
            return
        numbers = found.run
        if found.best is not None and self.config.keep_best:
            found.best.load(run_state.weights(self.model), checkpoints.group)
            self.best.take(self.model)
        run_state.load(found, self.model, self.optimizer, self.metrics, self.device, checkpoints.group)
        self.result = FitResult(**numbers["result"])
        self.epoch, self.position, self.evaluated_first = numbers["epoch"], numbers["step"], True
        self.best.worse = numbers["worse"]
        self.best.peak = -math.inf if numbers.get("peak") is None else numbers["peak"]
        self.saved_step = self.result.steps
        if self.data is not None and numbers.get("source") is not None:
            self.data.restore(numbers["source"])
        self.optimizer.resume(self.result.steps, self.result.batches)
        if self.log:
            self.log.cut(self.result.steps)
        self.progress.start_at(self.result.steps)
        if dist.get_rank() == 0:
            logger.info("resuming from checkpoint %s at step %d, epoch %d", found.path, self.result.steps, self.epoch)

    def run(self, batches: Batches) -> None:
        if self.config.evaluate_first and not self.evaluated_first:
            self.evaluate()
        self.evaluated_first = True
        self.epoch = max(self.epoch, 1)
        while not self.best.out_of_patience() and self.has_next_epoch():
            if self.train_epoch(batches(self.epoch - 1, self.position)):
                break
            if self.config.evaluate_every and self.epoch % self.config.evaluate_every == 0 and self.evaluate():
                break
            self.epoch, self.position = self.epoch + 1, 0
        if self.checkpoints is not None and self.flags is not None:
            stop = self.flags.settle(stop=self.signal.name is not None)
            if stop or self.checkpoints.config.while_training:
                self.save_checkpoint()  # a signal during the final evaluation and export then loses no step
            if stop:
                self.raise_preempted()
        self.pipeline.detach()
        self.optimizer.publish_average()
        self.best.restore(self.model)

    def has_next_epoch(self) -> bool:
        """Whether to train another epoch. Waits for one if the data may grow."""
        if self.data is None or not self.data.grows or self.epoch <= self.config.epochs:
            return self.epoch <= self.config.epochs
        if self.data.has_epoch(self.epoch - 1):
            return True
        if self.checkpoints is not None and self.checkpoints.config.while_training:
            self.save_checkpoint()  # the wait may be long
        heartbeat.outside_step()
        answer = self.data.wait_for_epoch(lambda: self.signal.name)
        if answer == "stop":
            self.save_checkpoint()
            self.raise_preempted()
        return answer == "epoch"

    def train_epoch(self, batches: Iterable[Any]) -> bool:
        """Train the steps of an epoch that are left; return whether to stop early."""
        self.model.train()
        self.interval.restart()
        self.label_sum = torch.zeros(())
        start, iterator, stop = self.position, self.track_batches(batches), False
        while not stop and self.train_step(iterator):
            if self.result.steps % self.config.log_every == 0:
                self.log_interval()
            if self.config.evaluate_steps and self.result.steps % self.config.evaluate_steps == 0:
                self.log_interval()
                stop = self.evaluate()
            self.save_if_due()
            if self.profiler is not None:
                heartbeat.outside_step()
                with self.interval.pause(named=False):
                    self.profiler.step()
        heartbeat.outside_step()
        self.log_interval()
        if stop:
            self.pipeline.reset()
            if self.data is not None:
                self.data.batches_dropped()
        elif self.epoch == 1 and start == 0:
            self.check_labels()
        return stop

    def train_step(self, iterator: Iterator[Any]) -> bool:
        """One step; return False at the end of the epoch. Does not wait for the device."""
        heartbeat.in_step(self.result.steps + 1)
        ended = False
        while not ended:
            try:
                loss, rows = self.pipeline.train_batch(iterator)
            except StopIteration:  # before the first batch of a step; the last step of an epoch may have fewer
                return False
            except (RuntimeError, MemoryError) as error:
                if (out_of_memory := in_step(error, self.result.steps + 1)) is not None:
                    raise out_of_memory from error
                raise
            self.interval.add(loss, rows)
            self.result.rows += rows
            self.result.batches += 1
            self.position += 1
            if self.data is not None:
                self.data.batch_trained()
            if self.metrics is not None:
                self.metrics.step()
            ended = self.pipeline.step_ended
        self.result.steps += 1
        return True

    def track_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, each counted as the pipeline takes it."""
        iterator = iter(batches)
        while True:
            heartbeat.in_step(self.result.steps + 1, WAITING_FOR_DATA)
            with self.interval.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            heartbeat.in_step(self.result.steps + 1)
            labels = batch.labels
            self.pipeline.taken(labels.shape[0])
            self.label_sum = self.label_sum.to(labels.device) + labels.detach().sum()
            if self.data is not None:
                self.data.batch_taken(batch)
            yield batch

    def log_interval(self) -> None:
        """Log the steps since the last call. This is the only place where a step waits for the device."""
        if not self.interval.losses:
            return
        last, accumulate = self.result.steps, self.config.accumulate
        steps = -(-len(self.interval.losses) // accumulate)  # an interval ends with the epoch, as a shorter step does
        found = self.interval.end()
        check_ids(self.model)
        if self.config.on_nonfinite == "stop" and found.first_bad is not None:
            batch, loss = found.first_bad
            step = last - steps + 1 + batch // accumulate
            raise InputError(
                f"non-finite loss {loss} at step {step}, epoch {self.epoch}; lower the learning rate, or check labels, "
                "features and factors for NaN (the two-tower network: --on-nonfinite skip skips such batches)"
            )
        found.reduce()
        self.result.train_seconds += found.seconds
        self.result.losses.append(found.loss)
        self.result.skipped += found.skipped
        if found.skipped and dist.get_rank() == 0:
            where = f"steps {last - steps + 1} to {last}"
            text = "%s: skipped %d batches with a non-finite loss, %d in total"
            logger.warning(text, where, found.skipped, self.result.skipped)
        scalars = {"train/epoch": self.epoch, "train/learning_rate": self.optimizer.learning_rate, **found.scalars()}
        if self.optimizer.scale is not None:
            scalars["train/gradient_scale"] = self.optimizer.scale.check()
        if self.metrics is not None:
            scalars |= {f"train/{name}": value for name, value in self.metrics.compute().items()}
        if self.data is not None:
            scalars |= self.data.scalars()
        self.progress.update(steps, status_line(scalars))
        if self.log:
            self.log.write(last, scalars)

    def evaluate(self) -> bool:
        """Evaluate, at most once per step, and keep the best weights; return whether patience is exhausted."""
        done = self.result.evaluations
        if self.evaluate_model is None or (done and done[-1]["step"] == self.result.steps):
            return False
        start = time.monotonic()
        heartbeat.outside_step()
        with self.interval.pause(), self.memory.suspended(), self.optimizer.averaged(), matmul_precision("highest"):
            malloc_trim()  # make room for the vectors of all users and items
            self.pipeline.detach()
            self.model.eval()
            metrics = dict(self.evaluate_model())
            self.model.train()
            self.pipeline.attach()
        self.result.evaluate_seconds += time.monotonic() - start
        if self.config.metric not in metrics:
            known = ", ".join(metrics)
            raise InputError(f"metric {self.config.metric!r} is not among those of the evaluation: {known}")
        position = {"step": self.result.steps, "epoch": self.epoch, "train_seconds": self.result.train_seconds}
        found = {**metrics, **position}
        done.append(found)
        if self.log:
            self.log.write(self.result.steps, {f"evaluate/{name}": value for name, value in metrics.items()})
        if dist.get_rank() == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.islower())
            logger.info("epoch %d, step %d: %s", self.epoch, self.result.steps, shown)
        accepted = self.result.best is None or self.accept is None or self.accept(found)
        best = self.best.update(found, accepted, self.result.best)
        if best is not None:
            self.result.best = best
            if self.config.keep_best:
                with self.optimizer.averaged():
                    self.best.take(self.model)
                    if self.checkpoints is not None:
                        self.checkpoints.save(run_state.weights(self.model), {}, self.result.steps, best=True)
        return self.best.out_of_patience()

    def check_labels(self) -> None:
        """Raise InputError if all labels of the first epoch are 0: the loss then says nothing."""
        total = torch.tensor([float(self.label_sum), float(self.position)])
        dist.all_reduce(total)
        if total[1] and not total[0]:
            raise InputError(
                "each row that was trained on has the label 0: there is nothing to learn; expected labels above 0 of "
                "positives (the two-tower network: omit --use-label, and every row is a positive; --model: check "
                "--label-threshold, or sample more rows)"
            )

    def save_if_due(self) -> None:
        """After a step: save a checkpoint if one is due, and stop after a signal on any rank."""
        if self.checkpoints is None or self.flags is None:
            return
        overdue = self.checkpoints.rank == 0 and self.checkpoints.overdue()
        stop, due = self.flags.exchange(stop=self.signal.name is not None, checkpoint=overdue)
        if stop or due or self.checkpoints.due(self.result.steps):
            self.save_checkpoint()
        if stop:
            self.raise_preempted()

    def save_checkpoint(self) -> None:
        """Save the state of the run, unless the last checkpoint is of this step."""
        if self.checkpoints is None or self.saved_step == self.result.steps:
            return
        self.log_interval()
        heartbeat.outside_step()
        state = run_state.collect(self.model, self.optimizer, self.metrics, self.device)
        numbers = {
            "epoch": self.epoch,
            "step": self.position,
            "world": dist.get_world_size(),
            "worse": self.best.worse,
            "peak": None if math.isinf(self.best.peak) else self.best.peak,
            "best_step": int(self.result.best["step"]) if self.best.has_weights and self.result.best else None,
            "result": asdict(self.result),
            "source": None if self.data is None else self.data.state(),
        }
        with self.memory.suspended():
            self.checkpoints.save(state, numbers, self.result.steps)
        self.saved_step = self.result.steps

    def raise_preempted(self) -> None:
        """Raise Preempted once the checkpoint is complete."""
        assert self.checkpoints is not None
        assert self.flags is not None
        self.checkpoints.wait()
        self.flags.close()
        name, path = self.signal.name or "a signal of another rank", self.checkpoints.last
        saved = f"rerun the same command to resume from {path}" if path else "no checkpoint could be written"
        raise Preempted(f"stopped by {name} after step {self.result.steps}: {saved}")
