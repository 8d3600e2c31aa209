"""Precision of training: TF32 products, autocast of the dense part, and the gradient scale of fp16.

Weights, their optimizers, tables and losses are float32 in each of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec import JaggedTensor, KeyedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable

from recpress.data.errors import InputError
from recpress.trainer.config import Precision

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE, GROWTH_STEPS, LEAST_SCALE = 65536.0, 2000, 1e-6


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise InputError if this device cannot train in this precision."""
    if precision == "tf32" and device.type != "cuda":
        raise InputError("precision is tf32, which GPUs have; expected fp32, bf16 or fp16 on the device cpu")
    if device.type == "cuda" and precision in ("tf32", "bf16") and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(
            f"precision is {precision}, which {torch.cuda.get_device_name(device)} does not have; expected fp32 or fp16"
        )
    if precision in TYPES and device.type == "cpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with autocast(precision, device):
                supported = torch.is_autocast_enabled("cpu")
        if not supported:
            raise InputError(f"precision is {precision}, which this torch lacks on the device cpu; expected fp32")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(device.type, TYPES[precision]) if precision in TYPES else nullcontext()


@contextmanager
def matmul_precision(value: Literal["highest", "high"]) -> Iterator[None]:
    """Within the block, matrix products of float32 are exact to float32 ("highest"), or use TF32 on CUDA ("high")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class GradientScale:
    """Factor of the loss in fp16, so that small gradients do not become zero.

    A step whose gradients are not finite is skipped, and halves the factor; 2,000 steps without one double it. Tables
    get their gradients divided by the factor again, before TorchRec's fused optimizer applies them. A batch whose
    gradients for tables are not finite leaves them unchanged on its rank.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.factor = torch.full((), FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)
        """Since the factor changed."""
        self._overflow = torch.zeros((), device=device)  # of gradients for tables, in the step in progress
        for module in model.modules():
            if isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
                module.register_forward_hook(self._after_lookup)

    def state(self) -> dict[str, torch.Tensor]:
        """Of a checkpoint. Not copied."""
        return {"factor": self.factor, "good_steps": self.good_steps}

    def overflow(self) -> torch.Tensor:
        """float32, on the device: above 0 if gradients for tables were not finite in this step on any rank.
        Collective."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self._overflow)
        return self._overflow

    def update(self, nonfinite: torch.Tensor) -> None:
        """After a step. `nonfinite`: above 0 if it was skipped."""
        bad = nonfinite > 0
        self.good_steps.copy_(torch.where(bad, 0.0, self.good_steps + 1))
        grow = self.good_steps >= GROWTH_STEPS
        self.factor.mul_(torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.mul_(~grow)
        self._overflow.zero_()

    def check(self) -> float:
        """The factor. Waits for the device.

        Raises:
            InputError: it has been halved so often that gradients are not finite with any factor.
        """
        factor = float(self.factor)
        if factor < LEAST_SCALE:
            raise InputError(
                "the gradients of many steps in a row are not finite (--precision fp16), so that they were skipped; "
                "expected a lower learning rate, finite features and factors, or --precision bf16"
            )
        return factor

    def _after_lookup(self, module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(result, LazyAwaitable):
            result.callbacks.append(self._hooked)

    def _hooked(self, found: KeyedTensor | dict[str, JaggedTensor]) -> KeyedTensor | dict[str, JaggedTensor]:
        for vectors in found.values() if isinstance(found, dict) else [found]:
            if vectors.values().requires_grad:
                vectors.values().register_hook(self._unscaled)
        return found

    def _unscaled(self, gradient: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(gradient).all()
        self._overflow += ~finite
        return torch.where(finite, gradient / self.factor, 0.0)
