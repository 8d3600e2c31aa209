"""Frozen tables, and how their rows are stored: in 32, 16, 8 or 4 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

Storage = Literal["fp32", "fp16", "int8", "int4"]
QUANTIZED: tuple[Storage, ...] = ("int8", "int4")
"""Those whose rows have a scale and an offset of their own, so that no row is cut."""
SPARSE_TYPE = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8}
STORAGE_OF: dict[DataType, Storage] = {
    DataType.FP32: "fp32",
    DataType.FP16: "fp16",
    DataType.INT8: "int8",
    DataType.INT4: "int4",
}
DATA_TYPE = {storage: data for data, storage in STORAGE_OF.items()}
DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8, "int4": torch.uint8}
INT4_SCALE_BYTES = 4
"""Bytes of an int4 row's scale and offset."""


def row_bytes(storage: Storage, dim: int) -> int:
    """Bytes of a row of `dim` values, scale and offset included."""
    return {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 8, "int4": dim // 2 + 4}[storage]


def stored_row_bytes(storage: Storage, dim: int, device_type: str) -> int:
    """Bytes that a row takes in the kernel's memory: on CUDA, fbgemm pads rows of int4 to 16 bytes."""
    size = row_bytes(storage, dim)
    return -(-size // 16) * 16 if storage == "int4" and device_type == "cuda" else size


class PlannedTable(nn.Parameter):
    """What a sharding planner is shown of a table: its shape, on the device "meta", and the bytes of its rows."""

    bytes_per_row: int

    @classmethod
    def of(cls, rows: int, dim: int, dtype: torch.dtype, bytes_per_row: int) -> PlannedTable:
        made = cls(torch.empty(rows, dim, dtype=dtype, device="meta"), requires_grad=False)
        made.bytes_per_row = bytes_per_row
        return made

    def element_size(self) -> Any:
        """Bytes of a value, with its share of the row's scale, offset and padding. TorchRec's planner multiplies it by
        the number of values and rounds up, so it is just below where it is no whole number."""
        size, rest = divmod(self.bytes_per_row, self.shape[1])
        return math.nextafter(self.bytes_per_row / self.shape[1], 0.0) if rest else size


def encode(block: torch.Tensor, storage: Storage, table: str = "") -> torch.Tensor:
    """float32 (b, d) -> what is stored. A value is off by at most (max - min) / 510 of its row in int8, and by about
    (max - min) / 30 in int4, whose scale and offset are rounded to float16.

    Raises:
        ValueError: fp16, which int4's scale and offset are too, cannot hold a value.
    """
    if storage == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(block)
    if block.numel() and storage != "fp32" and float(block.abs().max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"table {table!r}: a value of {float(block.abs().max()):.4g} is too large for {storage}")
    if storage == "int4":
        return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(block, 4).roll(INT4_SCALE_BYTES, 1)
    return block.to(DTYPE[storage])


def decode(stored: torch.Tensor, storage: Storage) -> torch.Tensor:
    """What is stored -> float32 (b, d)."""
    if storage == "int8":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored.contiguous())
    if storage == "int4":
        return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored.roll(-INT4_SCALE_BYTES, 1), 4)
    return stored.float()


@dataclass(frozen=True, kw_only=True)
class FrozenTable:
    """One frozen table. `int8` stores a row as 8-bit codes with a float32 scale and offset of its own, `int4` as 4-bit
    codes with a float16 scale and offset."""

    name: str
    rows: int
    dim: int
    """Length of a vector; a multiple of 4 (`rows.round_up`)."""
    features: tuple[str, ...]
    """Keys of the KeyedJaggedTensor that look rows up here."""
    storage: Storage = "fp32"

    def config(self) -> EmbeddingBagConfig:
        return EmbeddingBagConfig(
            name=self.name,
            num_embeddings=self.rows,
            embedding_dim=self.dim,
            feature_names=list(self.features),
            data_type=DATA_TYPE[self.storage],
        )
