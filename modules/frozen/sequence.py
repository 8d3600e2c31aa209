"""Frozen tables for sequences: an EmbeddingCollection that is never trained, one vector per id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.types import LazyAwaitable, ShardingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.optim.keyed import CombinedOptimizer

from recpress.modules.frozen import operators
from recpress.modules.frozen.collection import FrozenTableSharder, ShardedFrozenTables, check_tables, shard_of
from recpress.modules.frozen.kernel import (
    STORAGE_OF,
    FrozenKernel,
    FrozenTable,
    HasFrozenTables,
    TableShard,
)
from recpress.modules.frozen.quantized import QuantizedFrozenSequences, register_quantized
from recpress.modules.frozen.unsharded import Unsharded
from recpress.modules.id_check import is_traced


class FrozenEmbeddingCollection(Unsharded, HasFrozenTables, EmbeddingCollection):
    """Frozen tables: KeyedJaggedTensor -> one vector per id, without a gradient. All tables have the same dimension.

    An EmbeddingCollection without parameters. Shard it, load it and save it as a `FrozenEmbeddingBagCollection`.

    Raises:
        ValueError: as `FrozenEmbeddingBagCollection`; the dimensions differ.

    Example:
        >>> collection = FrozenEmbeddingCollection([FrozenTable(name="item", rows=9, dim=4, features=("item_id",))])
        >>> collection.load("item", torch.arange(36.0).view(9, 4))
        >>> features = KeyedJaggedTensor(["item_id"], torch.tensor([2, 0]), lengths=torch.tensor([2, 0]))
        >>> collection(features)["item_id"].values()
        tensor([[ 8.,  9., 10., 11.],
                [ 0.,  1.,  2.,  3.]])
    """

    def __init__(self, tables: Iterable[FrozenTable], device: torch.device | str = "cpu") -> None:
        nn.Module.__init__(self)  # not that of EmbeddingCollection, which creates trainable tables
        self._tables, self._device = list(tables), torch.device(device)
        check_tables(self._tables)
        if len({table.dim for table in self._tables}) > 1:
            raise ValueError(
                f"table {self._tables[-1].name!r}: tables of a FrozenEmbeddingCollection have one dimension"
            )
        self._plain: list[FrozenKernel] = []  # not a ModuleList, so that state_dict and DDP do not see the rows
        if self._device.type != "meta":
            for t in self._tables:
                self._plain.append(
                    FrozenKernel([TableShard(t.name, (0, t.rows), (0, t.dim), 1)], t.storage, self._device)
                )
        self._configs = [table.sequence_config() for table in self._tables]
        self._names = get_embedding_names_by_table(self._configs)
        self.init_checks()

    def tables(self) -> list[FrozenTable]:
        return self._tables

    def kernels(self) -> Iterator[FrozenKernel]:
        yield from self._plain

    @property
    def embeddings(self) -> nn.ModuleDict:
        """Empty: there is no trainable table."""
        return nn.ModuleDict()

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def embedding_dim(self) -> int:
        return self._tables[0].dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names

    def need_indices(self) -> bool:
        return False

    def use_gather_select(self) -> bool:
        return False

    def use_gather_select_per_sharding(self) -> None:
        return None

    def reset_parameters(self) -> None:
        """There are no parameters."""

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Keys of the result: `feature`, or `feature@table` if several tables share it, as in TorchRec."""
        traced = is_traced(features)
        if traced:
            self.check_loaded()
        else:
            self.check_sharding()
            self.check_batch(features)
        found, given = {}, features.to_dict()
        for table, names, kernel in zip(self._tables, self._names, self._plain, strict=True):
            for feature, name in zip(table.features, names, strict=True):
                ids = given[feature]
                if traced:
                    rows = operators.vectors(kernel.read(0), ids.values(), kernel.layout)
                else:
                    rows = kernel.each(ids.values())
                found[name] = JaggedTensor(rows, lengths=ids.lengths())
        return found


register_quantized(FrozenEmbeddingCollection, QuantizedFrozenSequences)


class _FrozenSequenceLookup(nn.Module):
    """The look-up of one sharding type on this rank: a kernel for each table."""

    def __init__(self, grouped_configs: list[Any], device: torch.device) -> None:
        super().__init__()
        tables = [(t, config) for config in grouped_configs for t in config.embedding_tables]
        self._splits = [table.num_features() for table, _ in tables]
        self._kernels = [
            FrozenKernel([shard_of(table, 1)], STORAGE_OF[config.data_type], device) for table, config in tables
        ]
        self._none = torch.empty(0, device=device)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Vectors of all ids, flat, in the order of the features."""
        if not self._kernels:
            return self._none
        parts = features.split(self._splits)
        values = [kernel.each(part.values()).view(-1) for kernel, part in zip(self._kernels, parts, strict=True)]
        return torch.cat(values) if len(values) > 1 else values[0]


class _FrozenSequences(LazyAwaitable[dict[str, JaggedTensor]]):
    """Waits for an exchange without autograd."""

    def __init__(self, inner: LazyAwaitable[dict[str, JaggedTensor]]) -> None:
        super().__init__()
        self._inner = inner

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        with torch.no_grad():
            return self._inner.wait()


class ShardedFrozenEmbeddingCollection(ShardedFrozenTables, ShardedEmbeddingCollection):
    """TorchRec's sharded collection: its exchanges of ids and vectors, with frozen look-ups between them."""

    _sharding_type_to_sharding: dict[str, Any]
    _device: torch.device | None
    _awaitable = _FrozenSequences

    def __init__(self, module: FrozenEmbeddingCollection, *args: Any, **kwargs: Any) -> None:
        self._specs = module.tables()
        configs = EmbeddingCollection([t.sequence_config() for t in self._specs], device=torch.device("meta"))
        super().__init__(configs, *args, **kwargs)
        self._optim = CombinedOptimizer([])
        self.init_checks()

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            groups = sharding._grouped_embedding_configs_per_rank[sharding._env.rank]
            self._lookups.append(_FrozenSequenceLookup(groups, self._device or torch.device("cpu")))

    def input_dist(self, ctx: EmbeddingCollectionContext, features: KeyedJaggedTensor) -> Any:
        """Call `check_batch` before TorchRec's exchange, which would change ids that are out of range."""
        self.check_batch(features)
        return super().input_dist(ctx, features)


class FrozenEmbeddingCollectionSharder(FrozenTableSharder, EmbeddingCollectionSharder):
    """Shards frozen tables of sequences row-wise, table-wise, column-wise or as replicas."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = (ShardingType.DATA_PARALLEL, ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE, ShardingType.ROW_WISE)
        return [t.value for t in types]

    @property
    def module_type(self) -> type[FrozenEmbeddingCollection]:
        return FrozenEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedFrozenEmbeddingCollection]:
        return ShardedFrozenEmbeddingCollection
