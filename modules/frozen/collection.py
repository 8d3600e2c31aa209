"""Frozen embedding tables: an EmbeddingBagCollection that is never trained, plain and under DistributedModelParallel.

TorchRec's fused tables ignore `requires_grad_(False)`, and a learning rate of 0 still pays for the backward pass and
the optimizer state. Here the look-up and the exchange of its results run without autograd, there is no optimizer, and
rows have 32, 16, 8 or 4 bits. `state_dict` contains only a fingerprint of each table: rows come from factors (`load`)
and do not change. `sequence.FrozenEmbeddingCollection` gives one vector per id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
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
from torchrec.optim.keyed import CombinedOptimizer

from recpress.modules.frozen import operators
from recpress.modules.frozen.kernel import (
    DTYPE,
    STORAGE_OF,
    FrozenKernel,
    FrozenTable,
    HasFrozenTables,
    PlannedTable,
    TableShard,
    stored_row_bytes,
)
from recpress.modules.frozen.quantized import QuantizedFrozenBags, register_quantized
from recpress.modules.frozen.unsharded import Unsharded
from recpress.modules.frozen.variable_batch import with_one_stride
from recpress.modules.id_check import host_reads, is_traced


class FrozenEmbeddingBagCollection(Unsharded, HasFrozenTables, EmbeddingBagCollection):
    """Frozen tables with sum pooling: KeyedJaggedTensor -> KeyedTensor without a gradient.

    An EmbeddingBagCollection without parameters: `embedding_bags` is empty. Use it directly, or shard it by
    DistributedModelParallel with `recpress.modules.sharders()`. On the device "meta" it has no rows and can only be
    sharded. A batch with a different stride per key (variable batch) is expanded before the look-up.

    Args:
        weighted: multiply rows by per-sample weights, which the features must have. If false, weights are ignored, as
            in TorchRec.

    Raises:
        ValueError: there is no table; a name occurs twice; a dimension is not a multiple of 4. In forward: a table was
            never loaded, the batch lacks a feature, or an id is out of its table's range. In DistributedModelParallel:
            the sharders lack that of this collection. When loading a checkpoint: it was saved with other rows.

    Example:
        >>> collection = FrozenEmbeddingBagCollection([FrozenTable(name="item", rows=9, dim=4, features=("item_id",))])
        >>> collection.load("item", torch.ones(9, 4))
        >>> features = KeyedJaggedTensor(["item_id"], torch.tensor([2, 3, 5]), lengths=torch.tensor([1, 2]))
        >>> collection(features)["item_id"]
        tensor([[1., 1., 1., 1.],
                [2., 2., 2., 2.]])
    """

    _device: torch.device

    def __init__(
        self, tables: Iterable[FrozenTable], device: torch.device | str = "cpu", *, weighted: bool = False
    ) -> None:
        nn.Module.__init__(self)  # not that of EmbeddingBagCollection, which creates trainable tables
        self._tables, self.weighted, self._is_weighted = list(tables), weighted, weighted
        self._device = torch.device(device)
        check_tables(self._tables)
        self._plain: list[FrozenKernel] = []  # not a ModuleList, so that state_dict and DDP do not see the rows
        if self._device.type != "meta":
            for t in self._tables:
                shard = TableShard(t.name, (0, t.rows), (0, t.dim), len(t.features))
                self._plain.append(FrozenKernel([shard], t.storage, self._device, weighted=weighted))
        features = [feature for table in self._tables for feature in table.features]
        self._names = [
            f"{feature}@{table.name}" if features.count(feature) > 1 else feature
            for table in self._tables
            for feature in table.features
        ]
        self._dims = [table.dim for table in self._tables for _ in table.features]
        self._configs = [table.config() for table in self._tables]
        self._places: dict[Any, list[tuple[list[int], torch.Tensor | None]]] = {}
        self.init_checks()

    def tables(self) -> list[FrozenTable]:
        return self._tables

    def kernels(self) -> Iterator[FrozenKernel]:
        yield from self._plain

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """Empty: there is no trainable table."""
        return nn.ModuleDict()

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def reset_parameters(self) -> None:
        """There are no parameters."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Keys of the result: `feature`, or `feature@table` if several tables share it, as in TorchRec."""
        if is_traced(features):
            return self._traced(features)
        self.check_sharding()
        self.check_batch(features)
        features = with_one_stride(features)
        values = [
            kernel(features.permute(*order)) for order, kernel in zip(self._orders(features), self._plain, strict=True)
        ]
        return KeyedTensor(self._names, self._dims, torch.cat(values, 1) if len(values) > 1 else values[0])

    def _orders(self, features: KeyedJaggedTensor) -> list[tuple[list[int], torch.Tensor | None]]:
        """The places of each table's features in the batch. On CUDA also as tensors, copied there once."""
        keys, device = features.keys(), features.device()
        if host_reads(features.values()):
            return [([keys.index(feature) for feature in table.features], None) for table in self._tables]
        known = (tuple(keys), device)
        if known not in self._places:
            places = [[keys.index(feature) for feature in table.features] for table in self._tables]
            self._places[known] = [(order, torch.tensor(order, dtype=torch.int32, device=device)) for order in places]
        return self._places[known]

    def _traced(self, features: KeyedJaggedTensor) -> KeyedTensor:
        self.check_loaded()
        batch = operators.one_stride(features).to_dict()
        values = []
        for table, kernel in zip(self._tables, self._plain, strict=True):
            rows = kernel.read(0)
            if table.storage == "fp16" and rows.device.type == "cpu":
                rows = rows.view(torch.uint8)
            for feature in table.features:
                bags = batch[feature]
                weights = bags.weights() if self.weighted else None
                values.append(operators.pooled(rows, bags.values(), bags.offsets(), weights, kernel.layout, table.dim))
        return KeyedTensor(self._names, self._dims, torch.cat(values, 1))


register_quantized(FrozenEmbeddingBagCollection, QuantizedFrozenBags)


def check_tables(tables: list[FrozenTable]) -> None:
    if not tables:
        raise ValueError("frozen tables: no table, expected at least one")
    for table in tables:
        if table.dim % 4:
            raise ValueError(f"table {table.name!r}: dimension {table.dim} is not a multiple of 4")


class _FrozenLookup(nn.Module):
    """The look-up of one sharding type on this rank: a kernel for each group of tables with the same storage."""

    def __init__(self, grouped_configs: list[Any], device: torch.device) -> None:
        super().__init__()
        self._splits = [config.num_features() for config in grouped_configs]
        self._kernels: list[FrozenKernel] = []
        for config in grouped_configs:
            shards = [shard_of(table, table.num_features()) for table in config.embedding_tables]
            storage = STORAGE_OF[config.data_type]
            self._kernels.append(FrozenKernel(shards, storage, device, weighted=config.is_weighted))
        self._none = torch.empty(0, device=device)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        if not self._kernels:  # this rank has no shard, but takes part in the exchange
            return self._none.new_empty(features.stride(), 0)
        parts = features.split(self._splits) if len(self._splits) > 1 else [features]
        values = [kernel(part) for kernel, part in zip(self._kernels, parts, strict=True)]
        return torch.cat(values, 1) if len(values) > 1 else values[0]


def shard_of(table: Any, features: int) -> TableShard:
    """A ShardedEmbeddingTable of TorchRec. Without metadata it is replicated."""
    row, column = (0, 0) if table.local_metadata is None else table.local_metadata.shard_offsets
    return TableShard(table.name, (row, row + table.local_rows), (column, column + table.local_cols), features)


class _Frozen(LazyGetItemMixin[str, torch.Tensor], LazyAwaitable[KeyedTensor]):
    """Waits for an exchange without autograd. Otherwise the wait would add a backward pass."""

    def __init__(self, inner: LazyAwaitable[KeyedTensor]) -> None:
        super().__init__()
        self._inner = inner

    def _wait_impl(self) -> KeyedTensor:
        with torch.no_grad():
            return self._inner.wait()


class ShardedFrozenTables(HasFrozenTables):
    """What both sharded frozen collections have in common: TorchRec's exchanges, without autograd."""

    _lookups: list[Any]
    _specs: list[FrozenTable]
    _awaitable: Callable[[Any], Any]
    """Waits for an exchange without autograd."""

    def tables(self) -> list[FrozenTable]:
        return self._specs

    def kernels(self) -> Iterator[FrozenKernel]:
        for lookup in self._lookups:
            yield from lookup._kernels

    def init_data_parallel(self) -> None:
        """Nothing to do: replicas do not change."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Nothing to do: there are no parameters or buffers."""

    def compute(self, ctx: Any, dist_input: KJTList) -> list[torch.Tensor]:
        base: Any = super()
        with torch.no_grad():
            return base.compute(ctx, dist_input)

    def output_dist(self, ctx: Any, output: list[torch.Tensor]) -> Any:
        base: Any = super()
        with torch.no_grad():
            return self._awaitable(base.output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> Any:
        base: Any = super()
        with torch.no_grad():
            return self._awaitable(base.compute_and_output_dist(ctx, input))


class ShardedFrozenEmbeddingBagCollection(ShardedFrozenTables, ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection: its exchanges of ids and vectors, with frozen look-ups between them."""

    _embedding_shardings: list[Any]
    _device: torch.device | None
    _awaitable = _Frozen

    def __init__(self, module: FrozenEmbeddingBagCollection, *args: Any, **kwargs: Any) -> None:
        self._specs = module.tables()
        configs = EmbeddingBagCollection(
            [t.config() for t in self._specs], is_weighted=module.weighted, device=torch.device("meta")
        )
        super().__init__(configs, *args, **kwargs)
        self._optim = CombinedOptimizer([])
        self.init_checks()

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            groups = sharding._grouped_embedding_configs_per_rank[sharding._env.rank]
            self._lookups.append(_FrozenLookup(groups, self._device or torch.device("cpu")))

    def input_dist(self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor) -> Any:
        """Call `check_batch` before TorchRec's exchange, which would change ids that are out of range."""
        self.check_batch(features)
        return super().input_dist(ctx, with_one_stride(features))


class FrozenTableSharder:
    """What the sharders of both frozen collections have in common.

    Args:
        planned_device: device to plan for, "cpu" or "cuda": CUDA pads int4 rows. Default: CUDA if this machine has it.
    """

    planned_device: str
    fused_params: dict[str, Any] | None
    qcomm_codecs_registry: Any
    sharded_module_type: Any

    def __init__(self, *args: Any, planned_device: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.planned_device = planned_device or ("cuda" if torch.cuda.is_available() else "cpu")

    def shard(
        self,
        module: Any,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> Any:
        sharded = self.sharded_module_type(
            module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        sharded.load_pending(module.pending)
        return sharded

    def shardable_parameters(self, module: Any) -> dict[str, nn.Parameter]:
        """Table shapes and row bytes for the planner, on the device "meta"."""
        return {
            t.name: PlannedTable.of(
                t.rows, t.dim, DTYPE[t.storage], stored_row_bytes(t.storage, t.dim, self.planned_device)
            )
            for t in module.tables()
        }

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["dense" if sharding_type == ShardingType.DATA_PARALLEL.value else "fused"]


class FrozenEmbeddingBagCollectionSharder(FrozenTableSharder, EmbeddingBagCollectionSharder):
    """Shards frozen tables in all ways of TorchRec. Part of `recpress.modules.sharders()`."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [t.value for t in ShardingType]

    @property
    def module_type(self) -> type[FrozenEmbeddingBagCollection]:
        return FrozenEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedFrozenEmbeddingBagCollection]:
        return ShardedFrozenEmbeddingBagCollection
