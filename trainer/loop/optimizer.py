"""The optimizer of the train loop: Adam for the dense part, the fused one of the tables, one schedule, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recpress.trainer.loop.average import WeightAverage
from recpress.trainer.model.table_optimizers import TABLE_OPTIMIZERS

if TYPE_CHECKING:
    from recpress.trainer.config import OptimizerConfig
    from recpress.trainer.loop.precision import GradientScale


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Factor of both learning rates at `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    done = min(max(done, 0.0), 1.0)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """The kernels of the trained tables. TorchRec does not register them as modules of the model."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            for lookup in module._lookups:
                yield from (m for m in lookup.modules() if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen))


class TrainOptimizer:
    """`zero_grad` and `step` for TrainPipelineSparseDist.

    The gradient norm is clipped over the dense part. It is replicated, so every rank computes the same norm without
    communication. Gradients of the tables are applied inside the backward pass, so their norm is never known.

    Gradients of the dense part add up over the batches of a step, and `step` applies their mean. A step of the
    schedule is one of the dense part.

    Args:
        ema: decay of an average of the dense weights; None: no average.
    """

    def __init__(
        self, model: DistributedModelParallel, config: OptimizerConfig, total_steps: int, *, ema: float | None = None
    ) -> None:
        self.config, self.total_steps, self.steps = config, total_steps, 0
        self.ends_step = True
        """Whether the batch in progress is the last of its step."""
        self.batches = 0
        """Batches of the step in progress whose gradients have been added up."""
        self.skip_nonfinite = False
        """Skip the update of the dense part if a gradient is NaN or infinite. Gradients are means over the ranks, so
        that all ranks skip the same steps."""
        self.scale: GradientScale | None = None
        """Of the loss, in fp16."""
        self.fused = model.fused_optimizer
        self._named = [(n, p) for n, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad]
        self.parameters = [parameter for _, parameter in self._named]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.dense]
        self.dense = (
            kind(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
            if self.parameters
            else None
        )
        self.average = WeightAverage(self.parameters, ema) if ema is not None and self.parameters else None
        # FBGEMM corrects the means of Adam and LAMB by the number of forward passes, evaluations included, and
        # TorchRec's checkpoints do not hold it.
        self._table_steps = 0
        self._counting = list(_kernels(model)) if TABLE_OPTIMIZERS[config.tables].counts_steps else []
        self._table_rates = [group["lr"] for group in self.fused.param_groups]
        self._factor = 0.0
        self._schedule()

    @property
    def learning_rate(self) -> float:
        """Of the dense part, at the next step."""
        return self.config.learning_rate * self._factor

    def zero_grad(self) -> None:
        """Before the forward pass of a batch."""
        if self.dense is not None and not self.batches:
            self.dense.zero_grad(set_to_none=True)
        for tables in self._counting:
            tables.iter.fill_(self._table_steps)
            tables.iter_cpu.fill_(self._table_steps)

    def step(self) -> None:
        """After the backward pass of a batch: update the dense part, if the batch is the last of its step."""
        self.batches += 1
        self._table_steps += 1
        if not self.ends_step:
            return
        if self.dense is not None:
            if self.scale is not None:
                torch._foreach_mul_(self._gradients(), 1 / (self.scale.factor * self.batches))
            elif self.batches > 1:
                torch._foreach_div_(self._gradients(), self.batches)
            if self.config.clip_norm:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
            if self.skip_nonfinite or self.scale is not None:
                # The fused kernel skips the update if this is 1, so the host does not wait for the gradients.
                self.dense.found_inf = self._nonfinite()
            self.dense.step()
            if self.scale is not None:
                self.scale.update(self.dense.found_inf)
        self.batches = 0
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        self._schedule()

    def _nonfinite(self) -> torch.Tensor:
        """float32, on the device: 1 if a gradient is NaN or infinite, else 0. Collective with `scale`."""
        found = ~torch.isfinite(torch.nn.utils.get_total_norm(self._gradients()))
        return (found if self.scale is None else found | (self.scale.overflow() > 0)).float()

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def dense_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(name of a parameter, its state) of the dense part. Not copied; zeros before the first step."""
        if self.dense is None:
            return
        for name, parameter in self._named:
            state = self.dense.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            yield name, state

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block, the model has the average of the dense weights, if there is one."""
        return nullcontext() if self.average is None else self.average.in_model()

    def publish_average(self) -> None:
        """After the last step: the model has the average for good, if there is one."""
        if self.average is not None:
            self.average.publish()

    def averages(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name of a parameter, its average) of the dense part. Not copied; none without `ema`."""
        if self.average is not None:
            yield from zip((name for name, _ in self._named), self.average.values, strict=True)

    def resume(self, steps: int, batches: int) -> None:
        """Set the schedule to this step. Optimizer states do not hold learning rates.

        Args:
            batches: on which tables have been trained.
        """
        self.steps, self._table_steps = steps, batches
        self._schedule()

    def _schedule(self) -> None:
        factor = schedule_factor(self.config, self.steps, self.total_steps)
        if factor == self._factor:
            return
        self._factor = factor
        if self.dense is not None:
            for group in self.dense.param_groups:
                group["lr"] = self.config.learning_rate * factor
        for group, rate in zip(self.fused.param_groups, self._table_rates, strict=True):
            group["lr"] = rate * factor
        self.fused.zero_grad()  # passes the learning rates to the kernels, which hold no gradients
