"""Frozen embedding tables: a collection of their own, sharded by TorchRec, with nothing of training in it.

`requires_grad_(False)` is ignored by TorchRec's fused tables, and a learning rate of 0 still pays for the
backward pass and the optimizer state. Here the lookup and the exchange of its results run without autograd,
there is no optimizer, and rows can be stored in 32, 16, 8 or 4 bits. Tables are not part of the module's
`state_dict`: they come from factors (`load`) and do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from recpress.modules.rows import RowSource, blocks, check_source
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    LazyAwaitable,
    LazyGetItemMixin,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import CombinedOptimizer

Storage = Literal["fp32", "fp16", "int8", "int4"]
QUANTIZED: tuple[Storage, ...] = ("int8", "int4")
"""Those whose rows have a scale and an offset of their own, so that no row is cut."""
_SPARSE = {"fp32": SparseType.FP32, "fp16": SparseType.FP16, "int8": SparseType.INT8}
_STORAGE: dict[DataType, Storage] = {
    DataType.FP32: "fp32",
    DataType.FP16: "fp16",
    DataType.INT8: "int8",
    DataType.INT4: "int4",
}
_DATA = {storage: data for data, storage in _STORAGE.items()}
_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8, "int4": torch.uint8}


def row_bytes(storage: Storage, dim: int) -> int:
    """Bytes of a row of `dim` values, scale and offset included."""
    return {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 8, "int4": dim // 2 + 4}[storage]


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
            data_type=_DATA[self.storage],
        )


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
        make = _int4_kernel if storage == "int4" else _kernel
        # In a tuple, out of nn.Module's sight: DistributedDataParallel broadcasts every parameter that it
        # finds, which would overwrite each rank's shard by that of rank 0.
        self._kernel = (make(shards, storage, device),)

    @torch.no_grad()
    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled (summed) rows, float32, (stride, sum over features of the shards' widths)."""
        weights = features.weights_or_none() if self.weighted else None
        if self.weighted and weights is None:
            raise ValueError(f"table {self.shards[0].table!r}: the features bring no per-sample weights, expected them")
        weights = None if weights is None else weights.float()
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
        stored = self.stored(index)
        if self.storage == "int8":
            return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored.contiguous())
        if self.storage == "int4":
            return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(stored.roll(-_SCALE, 1), 4)
        return stored.float()


_SCALE = 4  # bytes of an int4 row's scale and offset


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
        weights_precision=_SPARSE[storage],
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
        scale_bias_size_in_bytes=_SCALE,
        device=device,
    )
    kernel.initialize_weights()
    return kernel


def _tables_of_features(shards: list[Shard]) -> list[int]:
    return [index for index, shard in enumerate(shards) for _ in range(shard.features)]


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
        return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(block, 4).roll(_SCALE, 1)
    return block.to(_DTYPE[storage])


class _Kernels:
    """What the plain and the sharded collection share: loading and reading the rows of this rank."""

    def kernels(self) -> Iterator[FrozenKernel]:
        raise NotImplementedError

    def tables(self) -> list[FrozenTable]:
        raise NotImplementedError

    def load(self, table: str, source: RowSource) -> None:
        """Fill a table from `source` (rows, dim); every rank reads its own shard alone. May be called again.

        Raises:
            ValueError: shape does not fit, or a value is not finite or too large for the storage.
        """
        spec = {t.name: t for t in self.tables()}[table]
        check_source(source, table, spec.rows, spec.dim)
        for kernel, index in self._find(table):
            kernel.load(index, source)

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


class FrozenEmbeddingBagCollection(_Kernels, nn.Module):
    """Frozen tables with sum pooling: KeyedJaggedTensor -> KeyedTensor, never with a gradient.

    Used as it is, or sharded by DistributedModelParallel with `FrozenEmbeddingBagCollectionSharder` in its
    sharders. On the device "meta" it holds no rows and serves only to be sharded.

    Args:
        weighted: a row counts as often as its per-sample weight says, which the features must bring; otherwise weights
            are ignored, as TorchRec does.

    Raises:
        ValueError: a dimension is not a multiple of 4.
    """

    def __init__(
        self, tables: Iterable[FrozenTable], device: torch.device | str = "cpu", *, weighted: bool = False
    ) -> None:
        super().__init__()
        self._tables, self.weighted = list(tables), weighted
        self.device = torch.device(device)
        for table in self._tables:
            if table.dim % 4:
                raise ValueError(f"table {table.name!r}: dimension {table.dim} is not a multiple of 4")
        self._plain: list[FrozenKernel] = []  # not a ModuleList: the rows stay out of state_dict and DDP
        if self.device.type != "meta":
            for t in self._tables:
                shard = Shard(t.name, (0, t.rows), (0, t.dim), len(t.features))
                self._plain.append(FrozenKernel([shard], t.storage, self.device, weighted=weighted))
        features = [feature for table in self._tables for feature in table.features]
        self._names = [
            f"{feature}@{table.name}" if features.count(feature) > 1 else feature
            for table in self._tables
            for feature in table.features
        ]
        self._dims = [table.dim for table in self._tables for _ in table.features]

    def tables(self) -> list[FrozenTable]:
        return self._tables

    def kernels(self) -> Iterator[FrozenKernel]:
        yield from self._plain

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Keys of the result: `feature`, or `feature@table` where several tables share it, as in TorchRec."""
        assert self._plain, "on the device 'meta' this collection can only be sharded"
        keys = features.keys()
        values = [
            kernel(features.permute([keys.index(feature) for feature in table.features]))
            for table, kernel in zip(self._tables, self._plain, strict=True)
        ]
        return KeyedTensor(self._names, self._dims, torch.cat(values, 1) if len(values) > 1 else values[0])


class _FrozenLookup(nn.Module):
    """The lookup of one sharding type on this rank: a kernel for each group of tables with one storage."""

    def __init__(self, grouped_configs: list[Any], device: torch.device) -> None:
        super().__init__()
        self._splits = [config.num_features() for config in grouped_configs]
        self._kernels: list[FrozenKernel] = []
        for config in grouped_configs:
            shards = []
            for table in config.embedding_tables:
                row, column = table.local_metadata.shard_offsets
                rows, columns = (row, row + table.local_rows), (column, column + table.local_cols)
                shards.append(Shard(table.name, rows, columns, table.num_features()))
            storage = _STORAGE[config.data_type]
            self._kernels.append(FrozenKernel(shards, storage, device, weighted=config.is_weighted))
        self._none = torch.empty(0, device=device)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        if not self._kernels:  # this rank holds no shard, and takes part in the exchange
            return (
                self._none.view(features.stride(), 0)
                if features.stride() == 0
                else self._none.new_empty(features.stride(), 0)
            )
        parts = features.split(self._splits) if len(self._splits) > 1 else [features]
        values = [kernel(part) for kernel, part in zip(self._kernels, parts, strict=True)]
        return torch.cat(values, 1) if len(values) > 1 else values[0]


class _Frozen(LazyGetItemMixin[str, torch.Tensor], LazyAwaitable[KeyedTensor]):
    """Waits for an exchange without autograd: its wait would otherwise add a backward pass of its own."""

    def __init__(self, inner: LazyAwaitable[KeyedTensor]) -> None:
        super().__init__()
        self._inner = inner

    def _wait_impl(self) -> KeyedTensor:
        with torch.no_grad():
            return self._inner.wait()


class ShardedFrozenEmbeddingBagCollection(_Kernels, ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection, its exchanges of ids and vectors, with frozen lookups between."""

    def __init__(self, module: FrozenEmbeddingBagCollection, *args: Any, **kwargs: Any) -> None:
        self._specs = module.tables()
        configs = EmbeddingBagCollection(
            [t.config() for t in self._specs], is_weighted=module.weighted, device=torch.device("meta")
        )
        super().__init__(configs, *args, **kwargs)
        self._optim = CombinedOptimizer([])

    def tables(self) -> list[FrozenTable]:
        return self._specs

    def kernels(self) -> Iterator[FrozenKernel]:
        for lookup in self._lookups:
            yield from lookup._kernels

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            groups = sharding._grouped_embedding_configs_per_rank[sharding._rank]
            self._lookups.append(_FrozenLookup(groups, self._device or torch.device("cpu")))

    def init_data_parallel(self) -> None:
        """Nothing to synchronise."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Nothing to register: no parameter, no buffer."""

    def compute(self, ctx: EmbeddingBagCollectionContext, dist_input: KJTList) -> list[torch.Tensor]:
        with torch.no_grad():
            return super().compute(ctx, dist_input)

    def output_dist(self, ctx: EmbeddingBagCollectionContext, output: list[torch.Tensor]) -> _Frozen:
        with torch.no_grad():
            return _Frozen(super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> _Frozen:
        with torch.no_grad():
            return _Frozen(super().compute_and_output_dist(ctx, input))


class FrozenEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards frozen tables row-wise, table-wise or, unless their rows are quantized, column-wise."""

    def shard(
        self,
        module: FrozenEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFrozenEmbeddingBagCollection:
        for table in module.tables():
            if table.storage in QUANTIZED and "column" in params[table.name].sharding_type:
                raise ValueError(f"table {table.name!r}: rows of {table.storage} cannot be sharded by column")
        return ShardedFrozenEmbeddingBagCollection(
            module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    def shardable_parameters(self, module: FrozenEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Shapes and types for the planner; on the device "meta"."""
        return {
            t.name: nn.Parameter(
                torch.empty(t.rows, t.dim, dtype=_DTYPE[t.storage], device="meta"), requires_grad=False
            )
            for t in module.tables()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [t.value for t in (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE)]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]

    @property
    def module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedFrozenEmbeddingBagCollection]:
        return ShardedFrozenEmbeddingBagCollection
