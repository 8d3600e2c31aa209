"""Shards of frozen tables as fbgemm's kernels hold them, filled and read by the rank that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec import KeyedJaggedTensor

from recpress.modules.fingerprints import Fingerprinted, empty_rows_fingerprint, rows_fingerprint, unique_names
from recpress.modules.frozen.tables import (
    INT4_SCALE_BYTES,
    SPARSE_TYPE,
    FrozenTable,
    Storage,
    decode,
    encode,
    row_bytes,
)
from recpress.modules.rows import RowSource, blocks, check_source


@dataclass(frozen=True)
class Shard:
    """The part of one table that a kernel holds: a rectangle of rows and columns, end-exclusive."""

    table: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    features: int
    """How many features of a batch look up here."""


class FrozenKernel(nn.Module):
    """Shards of tables with one storage, looked up together by fbgemm, without autograd."""

    def __init__(self, shards: list[Shard], storage: Storage, device: torch.device, *, weighted: bool = False) -> None:
        super().__init__()
        self.shards, self.storage, self.device, self.weighted = shards, storage, device, weighted
        self._make()

    def _make(self) -> None:
        make = _int4_kernel if self.storage == "int4" else _kernel
        # In a tuple, out of nn.Module's sight: DistributedDataParallel broadcasts every parameter that it
        # finds, which would overwrite each rank's shard by that of rank 0.
        self._kernel = (make(self.shards, self.storage, self.device),)

    def __getstate__(self) -> dict[str, Any]:
        """Without fbgemm's kernel, which cannot be pickled: its rows instead."""
        state = {name: value for name, value in self.__dict__.items() if name != "_kernel"}
        return state | {"stored": [self.stored(index).clone() for index in range(len(self.shards))]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("stored")
        super().__setstate__(state)
        self._make()
        for index, rows in enumerate(stored):
            self.stored(index).copy_(rows)

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled (summed) rows, float32, (stride, sum over features of the shards' widths)."""
        weights = features.weights_or_none() if self.weighted else None
        if self.weighted and weights is None:
            raise ValueError(f"table {self.shards[0].table!r}: the features bring no per-sample weights, expected them")
        weights = None if weights is None else weights.float()
        # Copies where the types are others; the collection has refused ids that are no integers or out of range.
        return self._kernel[0](features.values().long(), features.offsets().long(), weights)

    def stored(self, index: int) -> torch.Tensor:
        """The bits of a shard: (rows, width); quantized ones are (rows, `row_bytes`) uint8.

        Scale and offset come last for int8 and first for int4, as fbgemm's kernels have them.
        """
        shard = self.shards[index]
        rows, width = shard.rows[1] - shard.rows[0], shard.columns[1] - shard.columns[0]
        if self.storage == "int4":
            weights = self._kernel[0].split_embedding_weights(split_scale_shifts=False)[index][0]
            return weights[:rows, : row_bytes("int4", width)]  # on CUDA rows are padded to 16 bytes
        return self._kernel[0].split_embedding_weights()[index].detach()[:rows]

    def load(self, index: int, source: RowSource) -> None:
        """Fill a shard from the same rectangle of `source`, block by block."""
        shard, stored = self.shards[index], self.stored(index)
        for first, block in blocks(source, shard.table, shard.rows, shard.columns):
            start = first - shard.rows[0]
            stored[start : start + block.shape[0]].copy_(encode(block, self.storage, shard.table))

    def decode(self, index: int) -> torch.Tensor:
        """A shard's rows as float32 (rows, width)."""
        return decode(self.stored(index), self.storage)


def _kernel(shards: list[Shard], storage: Storage, device: torch.device) -> Any:
    """The training kernel, with the one optimizer that has no state."""
    cuda = device.type == "cuda"
    place = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(max(1, s.rows[1] - s.rows[0]), s.columns[1] - s.columns[0], place, compute) for s in shards],
        feature_table_map=_tables_of_features(shards),
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=0.0,
        weights_precision=SPARSE_TYPE[storage],
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        device=device,
    )


def _int4_kernel(shards: list[Shard], storage: Storage, device: torch.device) -> Any:
    """The inference kernel: the training kernel has no rows of 4 bits."""
    place = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(s.table, max(1, s.rows[1] - s.rows[0]), s.columns[1] - s.columns[0], SparseType.INT4, place) for s in shards],
        feature_table_map=_tables_of_features(shards),
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        scale_bias_size_in_bytes=INT4_SCALE_BYTES,
        device=device,
    )
    kernel.initialize_weights()
    return kernel


def _tables_of_features(shards: list[Shard]) -> list[int]:
    return [index for index, shard in enumerate(shards) for _ in range(shard.features)]


class HasKernels(Fingerprinted):
    """What the plain and the sharded collection share: loading and reading the rows of this rank, checks of a batch."""

    def init_checks(self) -> None:
        """To be called at the end of `__init__`."""
        self._loaded: set[str] = set()
        self._rows_of: dict[str, tuple[str, int]] = {}  # feature -> the smallest table that it looks up, and its rows
        for table in self.tables():
            for feature in table.features:
                least = self._rows_of.get(feature, (table.name, table.rows))
                self._rows_of[feature] = min(least, (table.name, table.rows), key=lambda found: found[1])
        unique_names((t.name for t in self.tables()), "frozen tables")
        self.init_fingerprints({t.name: empty_rows_fingerprint(t.rows) for t in self.tables()})

    def describe_mismatch(self, name: str) -> str:
        return (
            f"frozen table {name!r}: the checkpoint was saved with other rows than those loaded here; load the rows "
            "that it was trained with (`load`, or `CompressReport.load`)"
        )

    @torch.compiler.disable
    def check_batch(self, features: KeyedJaggedTensor) -> None:
        """Refuse what would give wrong vectors. On CUDA this synchronises; the exchange of ids does so too.

        Raises:
            ValueError: a table was never loaded, or not with the rows of the checkpoint; a feature is missing, or has
                ids that are no integers, or an id that its table does not have.
        """
        for table in self.tables():
            if table.name not in self._loaded:
                raise ValueError(
                    f"frozen table {table.name!r}: its rows were never loaded, and sharding discards those loaded "
                    f"before; call `load({table.name!r}, rows)` of its collection, or `report.load(model)` after "
                    "`compress`, on every rank after DistributedModelParallel"
                )
        self.check_fingerprints()
        check_ids(features, self._rows_of)

    def filled(self, table: str) -> None:
        """Say that all of this rank's `shards` of a table were written to. There is no fingerprint of such rows."""
        spec = {t.name: t for t in self.tables()}[table]
        self._loaded.add(table)
        self.set_fingerprint(table, empty_rows_fingerprint(spec.rows))

    def kernels(self) -> Iterator[FrozenKernel]:
        raise NotImplementedError

    def tables(self) -> list[FrozenTable]:
        raise NotImplementedError

    def load(self, table: str, source: RowSource) -> None:
        """Fill a table from `source` (rows, dim); every rank reads its own shard alone. May be called again.

        Raises:
            ValueError: shape does not fit, or a value is not finite or too large for the storage; a checkpoint was
                loaded before that was saved with other rows.
        """
        specs = {t.name: t for t in self.tables()}
        if table not in specs:
            raise ValueError(f"there is no frozen table {table!r}; there are {', '.join(specs)}")
        spec = specs[table]
        check_source(source, table, spec.rows, spec.dim)
        self.set_fingerprint(table, rows_fingerprint(source))
        self._loaded.discard(table)  # until all of it is there
        for kernel, index in self._find(table):
            kernel.load(index, source)
        self._loaded.add(table)

    def shards(self, table: str) -> list[tuple[Shard, torch.Tensor]]:
        """What this rank stores of a table, as `FrozenKernel.stored` gives it; views that can be filled."""
        return [(kernel.shards[index], kernel.stored(index)) for kernel, index in self._find(table)]

    def decoded(self, table: str) -> list[tuple[Shard, torch.Tensor]]:
        """What this rank stores of a table, as float32."""
        return [(kernel.shards[index], kernel.decode(index)) for kernel, index in self._find(table)]

    def storage_bytes(self) -> int:
        """Bytes of the rows that this rank holds."""
        return sum(k.stored(i).nbytes for k in self.kernels() for i in range(len(k.shards)))

    def _find(self, table: str) -> list[tuple[FrozenKernel, int]]:
        return [(k, i) for k in self.kernels() for i, shard in enumerate(k.shards) if shard.table == table]


def check_ids(features: KeyedJaggedTensor, rows_of: Mapping[str, tuple[str, int]]) -> None:
    """Raise ValueError where a feature is missing, or its ids are no integers or out of range.

    rows_of: feature -> (table, its rows).
    """
    keys, values = features.keys(), features.values()
    for feature, (table, _) in rows_of.items():
        if feature not in keys:
            raise ValueError(f"table {table!r}: the batch has no feature {feature!r}; it has {', '.join(keys)}")
    if values.dtype not in (torch.int64, torch.int32):
        feature, (table, _) = next(iter(rows_of.items()))
        raise ValueError(
            f"table {table!r}: the ids of feature {feature!r} are {values.dtype}, expected torch.int64 or torch.int32"
        )
    parts = dict(zip(keys, values.split(features.length_per_key()), strict=True))
    checked = [(feature, *of) for feature, of in rows_of.items() if parts[feature].numel()]
    if not checked:
        return
    ranges = torch.stack([torch.stack(torch.aminmax(parts[feature])) for feature, _, _ in checked]).tolist()
    for (feature, table, rows), (low, high) in zip(checked, ranges, strict=True):
        if low < 0 or high >= rows:
            raise ValueError(
                f"table {table!r}: feature {feature!r} has the id {low if low < 0 else high}, expected 0 to {rows - 1}"
            )
