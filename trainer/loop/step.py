"""One step of training: forward, backward and both optimizers, on one batch or on several."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.precision import GradientScale, autocast


class StepPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline with `config.accumulate` batches per step.

    Tables are updated inside the backward pass of each batch. The gradients of the dense part add up, and the last
    batch of a step applies their mean. An epoch ends with a step of the batches that are left, at least one.
    """

    def __init__(
        self, model: DistributedModelParallel, optimizer: TrainOptimizer, config: FitConfig, device: torch.device
    ) -> None:
        # Without pipeline_postproc TorchRec silently leaves lookups behind an id map out of the pipeline.
        mapped = any(isinstance(module, LearnedHash) for module in model.modules())
        super().__init__(
            model,
            optimizer,
            device,
            execute_all_batches=True,
            pipeline_postproc=mapped,
            custom_model_fwd=self._forward,
        )
        self._sharded, self._dense = model, optimizer
        self._accumulate, self._precision = config.accumulate, config.precision
        if config.precision == "fp16" and optimizer.dense is not None:
            optimizer.scale = GradientScale(model, device)
        if config.on_nonfinite == "skip":
            optimizer.skip_nonfinite = True
            for module in model.modules():
                if isinstance(module, TwoTower):
                    module.skip_nonfinite = True
        self._replicated = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self._rows: deque[int] = deque()  # of each batch in the pipeline

    @property
    def step_ended(self) -> bool:
        """Whether the last batch that was trained on was the last of its step."""
        return self._dense.batches == 0

    def taken(self, rows: int) -> None:
        """The pipeline takes a batch of this many rows from the iterator."""
        self._rows.append(rows)

    def train_batch(self, iterator: Iterator[Any]) -> tuple[torch.Tensor, int]:
        """Train on the next batch; return its loss and its rows. Does not wait for the device.

        Raises:
            StopIteration: the epoch has ended, and so has its last step.
        """
        loss = self.progress(iterator)
        return loss, self._rows.popleft()

    def reset(self) -> None:
        """Forget the batches that the pipeline has taken and not trained on."""
        super().reset()
        self._rows.clear()

    def _forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward pass of a batch. The pipeline then holds the next two batches, if the epoch has them."""
        self._dense.ends_step = self._dense.batches + 1 == self._accumulate or len(self._rows) == 1
        with self._without_all_reduce(), autocast(self._precision, self._device):
            loss, output = self._sharded(batch)
        return (loss if self._dense.scale is None else loss * self._dense.scale.factor), output

    def _without_all_reduce(self) -> AbstractContextManager[None]:
        """Gradients of the dense part stay on their rank until the last batch of the step."""
        return nullcontext() if self._dense.ends_step or self._replicated is None else self._replicated.no_sync()
