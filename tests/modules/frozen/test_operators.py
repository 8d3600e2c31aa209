"""Look-ups of traced code give what the kernels give, from every layout of rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchrec.modules.embedding_configs import DataType

from recpress.modules.frozen import operators
from recpress.modules.frozen.kernel import decode_rows, encode_rows, from_half_scale, to_half_scale
from recpress.modules.frozen.quantized import _encoded
from tests.modules.frozen.table_cases import STORAGES

DIM = 16


def rows_of(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Nine rows as stored, and their values."""
    source = torch.randn(9, DIM, generator=torch.Generator().manual_seed(0))
    if layout == "int8, half scale":  # of CUDA
        stored = to_half_scale(encode_rows(source, "int8"))
        return stored, decode_rows(from_half_scale(stored), "int8")
    stored = encode_rows(source, layout)
    return stored, decode_rows(stored, layout)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", [*STORAGES, "int8, half scale"])
def test_vectors(layout: str, dtype: torch.dtype) -> None:
    stored, values = rows_of(layout)
    ids = torch.tensor([3, 0, 8, 3], dtype=dtype)
    torch.testing.assert_close(operators.vectors(stored, ids, layout), values[ids.long()])
    assert operators.vectors(stored, ids[:0], layout).shape == (0, DIM)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_pooled(storage: str, weighted: bool, dtype: torch.dtype) -> None:
    stored, values = rows_of(storage)
    ids, offsets = torch.tensor([3, 0, 8, 3], dtype=dtype), torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0]) if weighted else None
    rows = stored.view(torch.uint8) if storage == "fp16" else stored
    found = operators.pooled(rows, ids, offsets, weights, storage, DIM)
    each = values[ids.long()] * (1.0 if weights is None else weights[:, None])
    torch.testing.assert_close(found, torch.stack([each[:3].sum(0), torch.zeros(DIM), each[3]]))


def test_rows_of_cuda_quantize_without_another_loss() -> None:
    stored, values = rows_of("int8, half scale")
    kernel = SimpleNamespace(
        storage="int8", half_scale=True, stored=lambda index: stored, shards=[SimpleNamespace(columns=(0, DIM))]
    )
    codes, scales = _encoded(kernel, DataType.INT8)  # type: ignore[arg-type]
    step, least = scales.contiguous().view(torch.float16).float().split(1, 1)
    torch.testing.assert_close(codes * step + least, values)
    halves, nothing = _encoded(kernel, DataType.FP16)  # type: ignore[arg-type]
    assert nothing is None
    torch.testing.assert_close(halves.view(torch.float16), values.half())
