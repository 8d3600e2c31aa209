"""Frozen tables under DistributedModelParallel: TorchRec's plan and exchanges, and lookups without autograd between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
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
from torchrec.optim.keyed import CombinedOptimizer

from recpress.modules.frozen.frozen import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenKernel, HasKernels, Shard
from recpress.modules.frozen.tables import DTYPE, QUANTIZED, STORAGE_OF, FrozenTable, PlannedTable, stored_row_bytes


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
            storage = STORAGE_OF[config.data_type]
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


class ShardedFrozenEmbeddingBagCollection(HasKernels, ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection, its exchanges of ids and vectors, with frozen lookups between."""

    _lookups: list[Any]
    _embedding_shardings: list[Any]
    _device: torch.device | None

    def __init__(self, module: FrozenEmbeddingBagCollection, *args: Any, **kwargs: Any) -> None:
        self._specs = module.tables()
        configs = EmbeddingBagCollection(
            [t.config() for t in self._specs], is_weighted=module.weighted, device=torch.device("meta")
        )
        super().__init__(configs, *args, **kwargs)
        self._optim = CombinedOptimizer([])
        self.init_checks()

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

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor) -> Any:
        """As TorchRec's, after `check_batch`: the exchange would cut ids that are out of range to other ones."""
        self.check_batch(features)
        return super().input_dist(ctx, features)

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
    """Shards frozen tables row-wise, table-row-wise, table-wise or, unless their rows are quantized, column-wise.

    Args:
        planned_device: "cpu" or "cuda", what TorchRec plans for: rows of int4 are padded on CUDA. By default CUDA where
            this machine has it.
    """

    def __init__(self, *args: Any, planned_device: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planned_device = planned_device or ("cuda" if torch.cuda.is_available() else "cpu")

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
        """Shapes and the bytes of rows for the planner; on the device "meta"."""
        return {
            t.name: PlannedTable.of(
                t.rows, t.dim, DTYPE[t.storage], stored_row_bytes(t.storage, t.dim, self.planned_device)
            )
            for t in module.tables()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE, ShardingType.TABLE_ROW_WISE)
        return [t.value for t in types]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]

    @property
    def module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedFrozenEmbeddingBagCollection]:
        return ShardedFrozenEmbeddingBagCollection
