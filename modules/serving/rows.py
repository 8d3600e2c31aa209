"""Embedding rows in 32, 16, 8 or 4 bits, decoded during the look-up."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from recpress.modules.frozen.kernel import HALF_SCALE_BYTES, QUANTIZED, Storage, encode_rows
from recpress.modules.serving.tensors import Holder, LargeTensors, Stored

_BITS: dict[Storage, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


def narrower(stored: Storage, wanted: Storage) -> Storage:
    """The storage with fewer bits: a table is never served in more bits than it has."""
    return min(stored, wanted, key=lambda storage: _BITS[storage])


def parts_of(storage: Storage, dim: int) -> dict[str, tuple[int, torch.dtype]]:
    """Name -> (columns, dtype) of the tensors that hold the rows of a table."""
    if storage == "fp32":
        return {"values": (dim, torch.float32)}
    if storage == "fp16":
        return {"values": (dim, torch.float16)}
    if storage == "int8":
        return {"codes": (dim, torch.uint8), "scales": (2, torch.float32)}
    return {"codes": (dim // 2, torch.uint8), "scales": (2, torch.float16)}


def parts_of_encoded(encoded: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    """The tensors of `parts_of`, from rows as fbgemm's kernels store them (`kernel.encode_rows`)."""
    if storage == "int8":  # scale and offset follow the codes
        codes, scales = encoded.split([encoded.shape[1] - 8, 8], 1)
        return {"codes": codes.contiguous(), "scales": scales.contiguous().view(torch.float32)}
    if storage == "int4":  # scale and offset precede the codes
        scales, codes = encoded.split([HALF_SCALE_BYTES, encoded.shape[1] - HALF_SCALE_BYTES], 1)
        return {"codes": codes.contiguous(), "scales": scales.contiguous().view(torch.float16)}
    return {"values": encoded}


def encoded_parts(block: torch.Tensor, storage: Storage, table: str) -> dict[str, torch.Tensor]:
    """The tensors of `parts_of`, from float32 rows (b, dim).

    Raises:
        ValueError: a value is too large for float16, with the storage fp16 or int4.
    """
    return parts_of_encoded(encode_rows(block, storage, table), storage)


class ServedRows(Holder):
    """The rows of a table: index (n,) int64 -> (n, dim) float32.

    Args:
        parts: the tensors of `parts_of`, with equal numbers of rows.
    """

    def __init__(self, storage: Storage, parts: Mapping[str, Stored], large: LargeTensors) -> None:
        super().__init__(large)
        self.storage = storage
        for name, stored in parts.items():
            self.hold(name, stored)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        if self.storage not in QUANTIZED:
            return self.held("values")[index].float()
        codes, scales = self.held("codes")[index], self.held("scales")[index].float()
        if self.storage == "int4":
            codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
        return codes.float() * scales[:, :1] + scales[:, 1:]
