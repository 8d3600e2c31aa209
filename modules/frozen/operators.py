"""Look-ups of frozen rows in operators that torch.fx, TorchScript, torch.export and torch.compile can trace.

`FrozenKernel` is faster in training, but its modules of fbgemm cannot be traced.
"""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from torch.nn import functional as F
from torchrec import KeyedJaggedTensor

from recpress.modules.frozen.variable_batch import with_one_stride
from recpress.modules.id_check import require


@torch.fx.wrap
def one_stride(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """`with_one_stride`; in TorchScript an error for a variable batch."""
    if torch.jit.is_scripting():
        assert not features.variable_stride_per_key(), "frozen tables: no variable batch in TorchScript"
        return features
    else:  # TorchScript would compile it without `else`
        return with_one_stride(features)


@torch.fx.wrap
def pooled(
    rows: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, storage: str, dim: int
) -> torch.Tensor:
    """Summed rows of each bag, float32 (bags, dim). On a CPU by the inference kernel of the storage.

    Args:
        rows: as `FrozenKernel.stored` gives them; float16 on a CPU as bytes, because TorchScript cannot see it so.
        storage: `FrozenKernel.layout`.
        ids, offsets: as for torch.nn.EmbeddingBag with `include_last_offset`.
        weights: per-sample weights of the ids.

    Raises:
        RuntimeError: an id is out of range.
    """
    weights = None if weights is None else weights.float()
    offsets = offsets.to(ids.dtype)
    if storage != "fp32" and rows.device.type != "cpu":
        rows = vectors(rows, ids, storage)
        ids, storage = torch.arange(ids.size(0), device=ids.device, dtype=ids.dtype), "fp32"
    if storage == "fp32":
        return F.embedding_bag(
            ids, rows, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
        )  # fmt: skip
    if storage == "int8":
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            rows, ids, offsets, False, 0, False, weights, None, True
        )
    num_rows = rows.size(0)
    require(((ids >= 0) & (ids < num_rows)).all(), f"frozen table: an id is not in 0 to {num_rows - 1}")
    half = storage == "fp16"
    nothing = torch.empty(0, dtype=torch.uint8)
    return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
        dev_weights=rows.view(-1),
        uvm_weights=nothing,
        weights_placements=torch.tensor([3], dtype=torch.int32),  # host, of EmbeddingLocation
        weights_offsets=torch.zeros(1, dtype=torch.int64),
        weights_tys=torch.tensor([1 if half else 3], dtype=torch.uint8),  # of SparseType
        D_offsets=torch.tensor([0, dim], dtype=torch.int32),
        total_D=dim,
        max_int2_D=0,
        max_int4_D=0 if half else dim,
        max_int8_D=0,
        max_float16_D=dim if half else 0,
        max_float32_D=0,
        indices=ids,
        offsets=offsets,
        pooling_mode=0,  # sum
        indice_weights=weights,
        output_dtype=0,  # float32
        lxu_cache_weights=nothing,
        lxu_cache_locations=torch.empty(0, dtype=torch.int32),
        row_alignment=1,
    )


@torch.fx.wrap
def vectors(rows: torch.Tensor, ids: torch.Tensor, storage: str) -> torch.Tensor:
    """The row of each id (n,), float32 (n, dim). Errors as in `pooled`.

    Args:
        rows: as `FrozenKernel.stored` gives them.
    """
    found = rows[ids.long()]
    if storage == "int8":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(found)
    if storage in ("int4", "int8, half scale"):  # the operator expects scale and offset after the codes
        bits = 4 if storage == "int4" else 8
        return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(torch.cat([found[:, 4:], found[:, :4]], 1), bits)
    return found.float()
