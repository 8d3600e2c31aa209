"""Frozen tables: how rows are stored (32, 16, 8 or 4 bits), and the shards that fbgemm's kernels look up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from recpress.modules.fingerprints import Fingerprinted, empty_rows_fingerprint, rows_fingerprint, unique_names
from recpress.modules.id_check import ChecksIds, IdCheck, host_reads
from recpress.modules.row_source import PendingRows, RowSource, blocks, check_source

Storage = Literal["fp32", "fp16", "int8", "int4"]
QUANTIZED: tuple[Storage, ...] = ("int8", "int4")
"""Each row has its own scale and offset; if it is sharded by column, each part has."""
SPARSE_TYPE = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8}
STORAGE_OF: dict[DataType, Storage] = {
    DataType.FP32: "fp32",
    DataType.FP16: "fp16",
    DataType.INT8: "int8",
    DataType.INT4: "int4",
}
DATA_TYPE = {storage: data for data, storage in STORAGE_OF.items()}
DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8, "int4": torch.uint8}
_ROWS_AT_ONCE = 1 << 20
HALF_SCALE_BYTES = 4
"""Bytes of a row's scale and offset in float16: of int4, and on CUDA of int8."""


def row_bytes(storage: Storage, dim: int) -> int:
    """Bytes of a row of `dim` values, with scale and offset, on a CPU and in files."""
    return {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 8, "int4": dim // 2 + 4}[storage]


def stored_row_bytes(storage: Storage, dim: int, device_type: str) -> int:
    """Bytes of a row in the kernel's memory: on CUDA, fbgemm pads quantized rows to 16 bytes."""
    if device_type != "cuda" or storage not in QUANTIZED:
        return row_bytes(storage, dim)
    size = HALF_SCALE_BYTES + (dim if storage == "int8" else dim // 2)
    return -(-size // 16) * 16


class PlannedTable(nn.Parameter):
    """A table for a sharding planner: its shape, on the device "meta", and the bytes of its rows."""

    bytes_per_row: int

    @classmethod
    def of(cls, rows: int, dim: int, dtype: torch.dtype, bytes_per_row: int) -> PlannedTable:
        made = cls(torch.empty(rows, dim, dtype=dtype, device="meta"), requires_grad=False)
        made.bytes_per_row = bytes_per_row
        return made

    def element_size(self) -> Any:
        """Bytes of a value, including its share of the row's scale, offset and padding.

        TorchRec's planner multiplies it by the number of values and rounds up, so a fraction is rounded down slightly.
        """
        size, rest = divmod(self.bytes_per_row, self.shape[1])
        return math.nextafter(self.bytes_per_row / self.shape[1], 0.0) if rest else size


def encode_rows(block: torch.Tensor, storage: Storage, table: str = "") -> torch.Tensor:
    """Encode float32 rows (b, d) for storage.

    The error of a value is at most (max - min) / 510 of its row in int8, and about (max - min) / 30 in int4, whose
    scale and offset are rounded to float16.

    Raises:
        ValueError: a value is too large for float16, with the storage fp16 or int4.
    """
    if storage == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(block)
    if block.numel() and storage != "fp32" and float(block.abs().max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"table {table!r}: a value of {float(block.abs().max()):.4g} is too large for {storage}")
    if storage == "int4":
        return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(block, 4).roll(HALF_SCALE_BYTES, 1)
    return block.to(DTYPE[storage])


def decode_rows(stored: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Decode stored rows to float32 (b, d)."""
    if storage == "int8":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored.contiguous())
    if storage == "int4":
        return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored.roll(-HALF_SCALE_BYTES, 1), 4)
    return stored.float()


def to_half_scale(rows: torch.Tensor, table: str = "") -> torch.Tensor:
    """int8 rows of a CPU (b, dim + 8) -> of CUDA (b, 4 + dim): first scale and offset in float16, then the codes.

    The codes are those of the same values for the rounded scale and offset. The error of a value is at most about
    (max - min) / 400 + |min| / 2000 of its row. A row that `from_half_scale` made does not change.

    Raises:
        ValueError: a value is too large for float16.
    """
    scales = rows[:, -8:].clone().view(torch.float32)  # (b, 2): scale and offset
    values = rows[:, :-8] * scales[:, :1] + scales[:, 1:]
    if rows.numel() and float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"table {table!r}: a value of {float(values.abs().max()):.4g} is too large for int8 on CUDA")
    halves = scales.half()
    step, least = halves[:, :1].float(), halves[:, 1:].float()
    codes = torch.where(step > 0, (values - least) / step, 0.0).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([halves.view(torch.uint8), codes], 1)


def from_half_scale(rows: torch.Tensor) -> torch.Tensor:
    """int8 rows of CUDA -> of a CPU, without loss: see `to_half_scale`."""
    scales = rows[:, :HALF_SCALE_BYTES].clone().view(torch.float16).float()
    return torch.cat([rows[:, HALF_SCALE_BYTES:], scales.view(torch.uint8)], 1)


@dataclass(frozen=True, kw_only=True)
class FrozenTable:
    """One frozen table.

    `int8` stores a row as 8-bit codes with a float32 scale and offset per row (on CUDA float16, see `to_half_scale`),
    `int4` as 4-bit codes with a float16 scale and offset per row.
    """

    name: str
    rows: int
    dim: int
    """Dimension of a row, a multiple of 4 (`row_source.round_up`)."""
    features: tuple[str, ...]
    """Keys of the KeyedJaggedTensor whose ids look up rows of this table."""
    storage: Storage = "fp32"

    def config(self) -> EmbeddingBagConfig:
        return self._config(EmbeddingBagConfig)

    def sequence_config(self) -> EmbeddingConfig:
        return self._config(EmbeddingConfig)

    def _config(self, kind: Any) -> Any:
        return kind(
            name=self.name,
            num_embeddings=self.rows,
            embedding_dim=self.dim,
            feature_names=list(self.features),
            data_type=DATA_TYPE[self.storage],
        )


@dataclass(frozen=True)
class TableShard:
    """The part of one table in a kernel: a rectangle of rows and columns, end-exclusive."""

    table: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    features: int
    """Number of features that look up rows of the table."""


class FrozenKernel(nn.Module):
    """Shards of tables with one storage, looked up together by fbgemm, without autograd."""

    def __init__(
        self, shards: list[TableShard], storage: Storage, device: torch.device, *, weighted: bool = False
    ) -> None:
        super().__init__()
        self.shards, self.storage, self.device, self.weighted = shards, storage, device, weighted
        self._make()

    @property
    def half_scale(self) -> bool:
        """Whether int8 rows have scale and offset in float16."""
        return self.storage == "int8" and self.device.type == "cuda"

    def _make(self) -> None:
        make = _inference_kernel if self.storage == "int4" or self.half_scale else _kernel
        # In a tuple, so that nn.Module does not register it: DistributedDataParallel broadcasts every parameter,
        # which would overwrite each rank's shard by that of rank 0.
        self._kernel = (make(self.shards, self.storage, self.device),)
        self._stored = [self._view(index) for index in range(len(self.shards))]

    def __getstate__(self) -> dict[str, Any]:
        """The rows in place of fbgemm's kernel, which cannot be pickled."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_kernel", "_stored")}
        return state | {"stored": [rows.clone() for rows in self._stored]}

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
            raise ValueError(f"table {self.shards[0].table!r}: the features lack per-sample weights")
        weights = None if weights is None else weights.float()
        # The collection has rejected ids that are not integers or out of range, so these casts lose nothing.
        return self._look_up(features.values(), features.offsets(), weights)

    @torch.no_grad()
    def each(self, ids: torch.Tensor) -> torch.Tensor:
        """The row of each id (n,), of a kernel with one shard and one feature: (n, width) float32."""
        return self._look_up(ids, torch.arange(len(ids) + 1, device=ids.device), None)

    def _look_up(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        # fbgemm's inference kernel for CUDA takes 32 bits only in some versions
        small = self.device.type == "cuda" and self.storage in QUANTIZED
        dtype = torch.int32 if small else torch.int64
        return self._kernel[0](ids.to(dtype), offsets.to(dtype), weights)

    @property
    def layout(self) -> str:
        """How rows are stored, for `operators`."""
        return f"{self.storage}, half scale" if self.half_scale else self.storage

    def stored(self, index: int) -> torch.Tensor:
        """The stored rows of a shard: (rows, width), or (rows, `row_bytes`) uint8 if quantized.

        Scale and offset are last for int8 and first for int4, as in fbgemm's kernels; on CUDA first, see
        `to_half_scale`.
        """
        return self._stored[index]

    def _view(self, index: int) -> torch.Tensor:
        """Its rows in the memory of fbgemm's kernel."""
        shard = self.shards[index]
        rows, width = shard.rows[1] - shard.rows[0], shard.columns[1] - shard.columns[0]
        if self.storage == "int4" or self.half_scale:
            weights = self._kernel[0].split_embedding_weights(split_scale_shifts=False)[index][0]
            size = HALF_SCALE_BYTES + width if self.half_scale else row_bytes("int4", width)
            return weights[:rows, :size]  # CUDA pads rows to 16 bytes
        return self._kernel[0].split_embedding_weights()[index].detach()[:rows]

    def load(self, index: int, source: RowSource) -> None:
        """Load a shard from the same rectangle of `source`, block by block."""
        shard = self.shards[index]
        for first, block in blocks(source, shard.table, shard.rows, shard.columns):
            self.write(index, first - shard.rows[0], encode_rows(block, self.storage, shard.table))

    def write(self, index: int, start: int, rows: torch.Tensor) -> None:
        """Write rows as a CPU stores them (b, width or `row_bytes`) to a shard, from its row `start` on."""
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[first : first + _ROWS_AT_ONCE]
            encoded = to_half_scale(block, self.shards[index].table) if self.half_scale else block
            self.stored(index)[start + first : start + first + len(block)].copy_(encoded)

    def read(self, index: int) -> torch.Tensor:
        """A shard's rows as a CPU stores them: `stored` itself, except for int8 on CUDA."""
        return from_half_scale(self.stored(index)) if self.half_scale else self.stored(index)

    def decode(self, index: int) -> torch.Tensor:
        """A shard's rows as float32 (rows, width)."""
        return decode_rows(self.read(index), self.storage)


def _kernel(shards: list[TableShard], storage: Storage, device: torch.device) -> Any:
    """The training kernel, with the only optimizer that has no state."""
    cuda = device.type == "cuda"
    location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(max(1, s.rows[1] - s.rows[0]), s.columns[1] - s.columns[0], location, compute) for s in shards],
        feature_table_map=_tables_of_features(shards),
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=0.0,
        weights_precision=SPARSE_TYPE[storage],
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        device=device,
    )


def _inference_kernel(shards: list[TableShard], storage: Storage, device: torch.device) -> Any:
    """The inference kernel, because the training kernel has no 4-bit rows, and on CUDA no 8-bit rows."""
    location = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (
                s.table,
                max(1, s.rows[1] - s.rows[0]),
                s.columns[1] - s.columns[0],
                SparseType.INT4 if storage == "int4" else SparseType.INT8,
                location,
            )
            for s in shards
        ],
        feature_table_map=_tables_of_features(shards),
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        scale_bias_size_in_bytes=HALF_SCALE_BYTES,
        device=device,
    )
    kernel.initialize_weights()
    return kernel


def _tables_of_features(shards: list[TableShard]) -> list[int]:
    return [index for index, shard in enumerate(shards) for _ in range(shard.features)]


class HasFrozenTables(Fingerprinted, ChecksIds):
    """Base of the plain and the sharded collection: loads and reads the rows of this rank, and checks batches."""

    pending: PendingRows | None = None
    """Rows to load when this collection is sharded."""

    def init_checks(self) -> None:
        """Call this at the end of `__init__`."""
        self._loaded: set[str] = set()
        self._rows_of: dict[str, tuple[str, int]] = {}  # feature -> the smallest table that it looks up, and its rows
        for table in self.tables():
            for feature in table.features:
                smallest = self._rows_of.get(feature, (table.name, table.rows))
                self._rows_of[feature] = min(smallest, (table.name, table.rows), key=lambda found: found[1])
        self._id_check = IdCheck({feature: rows for feature, (_, rows) in self._rows_of.items()})
        unique_names((t.name for t in self.tables()), "frozen tables")
        self.init_fingerprints({t.name: empty_rows_fingerprint(t.rows) for t in self.tables()})

    def describe_mismatch(self, name: str) -> str:
        return (
            f"frozen table {name!r}: the checkpoint was saved with other rows than those loaded here; load the rows "
            "that it was trained with (`load`, or `CompressReport.load`)"
        )

    def check_loaded(self) -> None:
        """Raise ValueError if a table was never loaded."""
        for table in self.tables():
            if table.name not in self._loaded:
                raise ValueError(
                    f"frozen table {table.name!r}: its rows were never loaded, and sharding discards rows loaded "
                    f"before; call `load({table.name!r}, rows)` of its collection, or `report.load(model)` after "
                    "`compress`, on every rank after DistributedModelParallel; its `sharders=recpress.modules."
                    "sharders()` load the rows given to `compress`"
                )

    @torch.compiler.disable
    def check_batch(self, features: KeyedJaggedTensor) -> None:
        """Reject batches that would give wrong vectors.

        On CUDA it does not wait for the ids: an id out of range looks up row 0, and `check_ids` raises.

        Raises:
            ValueError: a table was never loaded, or not with the rows of the checkpoint; a feature is missing; its ids
                are not integers, or, on a CPU, out of the table's range.
        """
        self.check_loaded()
        self.check_fingerprints()
        _check_features(features, self._rows_of)
        ids, keys, lengths = features.values(), features.keys(), features.length_per_key()
        if not host_reads(ids):
            self._id_check.out_of_range(ids, keys, lengths)
        elif (
            first := _first_out_of_range(dict(zip(keys, ids.split(lengths), strict=True)), self._rows_of)
        ) is not None:
            raise self._id_error(*first)

    def check_ids(self) -> None:
        """Raise ValueError if an id was out of the range of its table. Waits for the device."""
        if (first := self._id_check.first()) is not None:
            raise self._id_error(*first)

    def _id_error(self, feature: str, found: int) -> ValueError:
        table, rows = self._rows_of[feature]
        return ValueError(f"table {table!r}: feature {feature!r} has the id {found}, expected 0 to {rows - 1}")

    def load_pending(self, pending: PendingRows | None) -> None:
        """Load the rows that wait for this collection to be sharded."""
        for table, source in ({} if pending is None else pending.sources).items():
            self.load(table, source)

    def filled(self, table: str) -> None:
        """Mark a table as loaded after writing to all of this rank's `shards`. Such rows have no fingerprint."""
        spec = {t.name: t for t in self.tables()}[table]
        self._loaded.add(table)
        self.set_fingerprint(table, empty_rows_fingerprint(spec.rows))

    def kernels(self) -> Iterator[FrozenKernel]:
        raise NotImplementedError

    def tables(self) -> list[FrozenTable]:
        raise NotImplementedError

    def load(self, table: str, source: RowSource) -> None:
        """Load a table from `source` (rows, dim). Each rank reads only its own shard. May be called again.

        Raises:
            ValueError: the shape does not fit; a value is not finite or too large for the storage; a checkpoint that
                was saved with other rows was loaded before.
        """
        specs = {t.name: t for t in self.tables()}
        if table not in specs:
            raise ValueError(f"no frozen table {table!r}; expected one of {', '.join(specs)}")
        spec = specs[table]
        check_source(source, table, spec.rows, spec.dim)
        self.set_fingerprint(table, rows_fingerprint(source))
        self._loaded.discard(table)  # until it is complete
        for kernel, index in self._find(table):
            kernel.load(index, source)
        self._loaded.add(table)

    def shards(self, table: str) -> list[tuple[TableShard, torch.Tensor]]:
        """This rank's shards of a table, with the rows as a CPU stores them (`FrozenKernel.read`)."""
        return [(kernel.shards[index], kernel.read(index)) for kernel, index in self._find(table)]

    def write(self, table: str, parts: Iterable[torch.Tensor]) -> None:
        """Write what `shards` returned, filled. Mark the table as loaded; such rows have no fingerprint."""
        for (kernel, index), rows in zip(self._find(table), parts, strict=True):
            if rows.data_ptr() != kernel.stored(index).data_ptr():
                kernel.write(index, 0, rows)
        self.filled(table)

    def decoded(self, table: str) -> list[tuple[TableShard, torch.Tensor]]:
        """This rank's shards of a table, as float32."""
        return [(kernel.shards[index], kernel.decode(index)) for kernel, index in self._find(table)]

    def whole(self, table: str, dim: int) -> Any:
        """The first `dim` columns of a table, float32: a tensor; if sharded, a ShardedTensor, by a collective call."""
        [spec] = [t for t in self.tables() if t.name == table]
        parts = [(shard, rows[:, : max(0, dim - shard.columns[0])]) for shard, rows in self.decoded(table)]
        layout = getattr(self, "module_sharding_plan", {}).get(table)
        if layout is None or layout.sharding_type == "data_parallel":
            return parts[0][1]
        env: Any = self._env
        rank = dist.get_rank()
        local = [
            Shard.from_tensor_and_offsets(rows.contiguous(), [shard.rows[0], shard.columns[0]], rank)
            for shard, rows in parts
            if rows.numel()
        ]
        return init_from_local_shards(local, spec.rows, dim, process_group=env.process_group)

    def storage_bytes(self) -> int:
        """Bytes of the rows on this rank."""
        return sum(k.stored(i).nbytes for k in self.kernels() for i in range(len(k.shards)))

    def _find(self, table: str) -> list[tuple[FrozenKernel, int]]:
        return [(k, i) for k in self.kernels() for i, shard in enumerate(k.shards) if shard.table == table]


def _check_features(features: KeyedJaggedTensor, rows_of: Mapping[str, tuple[str, int]]) -> None:
    """Raise ValueError if a feature is missing, or its ids are not integers.

    rows_of: feature -> (table, number of rows).
    """
    keys, values = features.keys(), features.values()
    for feature, (table, _) in rows_of.items():
        if feature not in keys:
            raise ValueError(f"table {table!r}: the batch has no feature {feature!r}, only {', '.join(keys)}")
    if values.dtype not in (torch.int64, torch.int32):
        feature, (table, _) = next(iter(rows_of.items()))
        raise ValueError(
            f"table {table!r}: the ids of feature {feature!r} are {values.dtype}, expected torch.int64 or torch.int32"
        )


def _first_out_of_range(
    ids: Mapping[str, torch.Tensor], rows_of: Mapping[str, tuple[str, int]]
) -> tuple[str, int] | None:
    """(feature, id) of the first id on the host that its table does not have."""
    checked = [(feature, rows) for feature, (_, rows) in rows_of.items() if ids[feature].numel()]
    if not checked:
        return None
    ranges = torch.stack([torch.stack(torch.aminmax(ids[feature])) for feature, _ in checked]).tolist()
    for (feature, rows), (low, high) in zip(checked, ranges, strict=True):
        if low < 0 or high >= rows:
            return feature, low if low < 0 else high
    return None
