"""Quantized communication: in how many bits vectors and their gradients cross ranks, by TorchRec's codecs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from recpress.data.errors import InputError
from recpress.modules.frozen.kernel import HasFrozenTables
from recpress.trainer.config import CommunicationConfig

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.25}
"""Of a number; int8 has 8 bytes of scale and offset for each 32 numbers."""
OPERATIONS = (
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
)
"""int8 fits the first only, else fp16 is sent: the second adds numbers, the third sends parts of any size."""
_BY_SUMS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)


class Int8Codec(QuantizedCommCodec):
    """fbgemm's codec. Vectors of each rank are padded to whole rows of the quantization, so that any batch fits."""

    def padded_size(
        self, input_tensor: torch.Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: QuantizationContext
    ) -> tuple[int, int]:
        """(width of this rank's vectors with padding, the padding)."""
        row = qcomm_ctx.row_dim
        qcomm_ctx.padded_dim_sum_per_rank = [-(-dim // row) * row for dim in dim_per_rank]
        padded = qcomm_ctx.padded_dim_sum_per_rank[my_rank]
        return padded, padded - dim_per_rank[my_rank]

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        """The bytes of vectors, flat or (B, width). Earlier releases of TorchRec leave the padding to the codec."""
        if ctx is not None and input_tensor.ndim == 2:
            input_tensor = nn.functional.pad(input_tensor, (0, -input_tensor.shape[1] % ctx.row_dim))
        return super().encode(input_tensor, ctx)


def codecs(config: CommunicationConfig) -> dict[str, QuantizedCommCodecs] | None:
    """Of each operation, for the sharders; None for fp32.

    TorchRec's `get_qcomm_codecs_registry` would send fp16 for bf16 on CPU. Here bf16 is bf16, and `check_communication`
    tries it.
    """
    if config.forward == config.backward == "fp32":
        return None
    found = {}
    for operation in OPERATIONS:
        by_bytes = config.forward == "int8"
        forward = CommType("fp16" if by_bytes else config.forward)
        both = get_qcomm_codecs(QCommsConfig(forward_precision=forward, backward_precision=CommType(config.backward)))
        if by_bytes and operation == CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL:
            both.forward = Int8Codec(SparseType.INT8, is_fwd=True)
        found[operation.name] = both
    return found


def check_communication(config: CommunicationConfig, device: torch.device) -> None:
    """Try both precisions with small tensors. Collective.

    Raises:
        InputError: the backend or device cannot do it. On every rank.
    """
    for way in ("forward", "backward"):
        precision = getattr(config, way)
        problem = _problem(precision, device) if precision != "fp32" else None
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, problem)
        if problem := next((text for text in everyone if text is not None), None):
            raise InputError(
                f"communication.{way} is {precision}, which {dist.get_backend()} on the device {device.type} cannot do "
                f"({problem}); expected {'fp16 or ' if precision != 'fp16' else ''}fp32"
            )


def _problem(precision: str, device: torch.device) -> str | None:
    """Why a precision cannot be used, in one line; None if it can. Collective."""
    world = dist.get_world_size()
    vectors = torch.arange(32.0 * world, device=device).view(world, 32)
    try:
        codec = _codec(precision)
        context = codec.create_context()
        sent = codec.encode(vectors, context).reshape(-1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        codec.decode(received, context)
        if precision != "int8":
            part = torch.empty(len(sent) // world, dtype=sent.dtype, device=device)
            dist.reduce_scatter(part, list(sent.chunk(world)))
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _codec(precision: str) -> Any:
    if precision == "int8":
        return Int8Codec(SparseType.INT8, is_fwd=True)
    return get_qcomm_codecs(QCommsConfig(forward_precision=CommType(precision))).forward


def bytes_per_vector(model: nn.Module, plan: ShardingPlan, config: CommunicationConfig, world: int) -> float:
    """Bytes that cross ranks for one vector of each feature of an example, and their gradients, without padding.

    A vector comes from the rank that has its table, and its gradient returns there, so a share of (world - 1) / world
    crosses ranks. Of a table that is sharded by rows, each other rank sends its part of the sum.

    Args:
        model: before it is sharded.
    """
    total = 0.0
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            tables: Sequence[BaseEmbeddingConfig] = module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollection):
            tables = module.embedding_configs()
        else:
            continue
        layouts = plan.plan.get(path, {})
        frozen, summed = isinstance(module, HasFrozenTables), isinstance(module, EmbeddingBagCollection)
        for table in tables:
            kind = layouts[table.name].sharding_type if table.name in layouts else ""
            forward = "fp16" if config.forward == "int8" and (kind in _BY_SUMS or not summed) else config.forward
            sizes = BYTES[forward] + (0.0 if frozen else BYTES[config.backward])
            crossing = world - 1 if kind in _BY_SUMS and summed else (world - 1) / world
            total += crossing * sizes * table.embedding_dim * len(table.feature_names)
    return total
