"""Shards the tables of a model: TorchRec's planner and DistributedModelParallel."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchrec.optim
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs, ShardingPlan, ShardingType
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import DataType

from recpress.data.errors import InputError
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollectionSharder
from recpress.modules.frozen.kernel import QUANTIZED, HasFrozenTables, PlannedTable, Storage, stored_row_bytes
from recpress.modules.frozen.sequence import FrozenEmbeddingCollectionSharder
from recpress.trainer.config import CommunicationConfig, TableOptimizer
from recpress.trainer.model.communication import bytes_per_vector, check_communication, codecs
from recpress.trainer.model.table_optimizers import TABLE_OPTIMIZERS

logger = logging.getLogger(__name__)

Codecs = dict[str, QuantizedCommCodecs] | None
FP32 = CommunicationConfig()
SHARDING_TYPES = tuple(t.value for t in (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE))
_ROW_WISE, _NODE_WISE = ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value
RESERVED = 0.3
"""Share of the memory that the planner reserves for batches, activations, the dense part and its optimizer."""
LARGE = 0.125
"""A table is sharded by rows if it needs more than this share of the memory for tables of a rank, and more than twice
an even share of all tables. TorchRec's planner would put it on one rank as long as it fits."""


class TableSharder(EmbeddingBagCollectionSharder):
    """Trainable tables with a fused optimizer; row-wise sharding on CPU too."""

    def __init__(self, optimizer: TableOptimizer, learning_rate: float, eps: float, codecs: Codecs = None) -> None:
        self.optimizer_class = _optimizer_class(optimizer)
        super().__init__(_fused_params(self.optimizer_class, learning_rate, eps), codecs)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [*SHARDING_TYPES, _NODE_WISE]

    def shardable_parameters(self, module: EmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Shapes for the planner, on the device "meta", with the optimizer, whose state the planner counts."""
        return _planned(super().shardable_parameters(module), self.optimizer_class)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


class SequenceSharder(EmbeddingCollectionSharder):
    """As `TableSharder`, for one vector per id."""

    def __init__(self, optimizer: TableOptimizer, learning_rate: float, eps: float, codecs: Codecs = None) -> None:
        self.optimizer_class = _optimizer_class(optimizer)
        super().__init__(_fused_params(self.optimizer_class, learning_rate, eps), codecs)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)

    def shardable_parameters(self, module: EmbeddingCollection) -> dict[str, nn.Parameter]:
        """As that of `TableSharder`."""
        return _planned(super().shardable_parameters(module), self.optimizer_class)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused"]


def _optimizer_class(optimizer: TableOptimizer) -> type[Any]:
    found: type[Any] = getattr(torchrec.optim, TABLE_OPTIMIZERS[optimizer].torchrec)
    return found


def _fused_params(optimizer: type[Any], learning_rate: float, eps: float) -> dict[str, Any]:
    return {"optimizer": optimizer_type_to_emb_opt_type(optimizer), "learning_rate": learning_rate, "eps": eps}


def _planned(weights: Mapping[str, nn.Parameter], optimizer: type[Any]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        rows, dim = weight.shape
        table = PlannedTable.of(rows, dim, weight.dtype, dim * weight.element_size())
        table._optimizer_classes = [optimizer]  # type: ignore[attr-defined]
        found[name] = table
    return found


def sharders(
    learning_rate: float = 0.01,
    optimizer: TableOptimizer = "row-wise-adagrad",
    *,
    eps: float = 1e-8,
    device_type: str = "",
    communication: CommunicationConfig = FP32,
) -> list[ModuleSharder]:
    """An optimizer for trainable tables, none for frozen ones.

    Args:
        device_type: device to plan for; default: CUDA if this machine has it.
        communication: precision between ranks.
    """
    registry = codecs(communication)
    return [
        TableSharder(optimizer, learning_rate, eps, registry),
        SequenceSharder(optimizer, learning_rate, eps, registry),
        FrozenEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry, planned_device=device_type),
        FrozenEmbeddingCollectionSharder(qcomm_codecs_registry=registry, planned_device=device_type),
    ]


def topology(device: torch.device, batch_size: int) -> Topology:
    """The ranks of the process group, with the memory of this machine for each."""
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    caps: dict[str, int] = {"ddr_cap": memory}
    if device.type == "cuda":
        caps["hbm_cap"] = torch.cuda.get_device_properties(device).total_memory
    return Topology(world, device.type, local_world_size=local, **caps)


def plan(
    model: nn.Module,
    device: torch.device,
    *,
    batch_size: int,
    sharding_types: Mapping[str, str] | None = None,
    table_sharders: list[ModuleSharder] | None = None,
) -> ShardingPlan:
    """The sharding plan, the same on all ranks. Collective.

    Args:
        batch_size: rows of a batch per rank, for the planner's estimates.
        sharding_types: table name -> sharding type, for tables that the planner must not choose for.

    Raises:
        InputError: the tables do not fit in memory. On rank 0.
    """
    cluster = topology(device, batch_size)
    chosen = planner(model, cluster, batch_size=batch_size, sharding_types=sharding_types)
    try:
        return chosen.collective_plan(model, table_sharders or sharders(), dist.group.WORLD)
    except PlannerError as error:
        tables = _tables(model, device.type)
        largest = max(tables, key=lambda name: tables[name].nbytes)
        storage = cluster.devices[0].storage
        memory = storage.hbm if device.type == "cuda" else storage.ddr
        whole, most, each = (
            f"{size / (1 << 30):.1f} GiB"
            for size in (sum(table.nbytes for table in tables.values()), tables[largest].nbytes, memory)
        )
        raise InputError(
            f"tables of {whole}, the largest of them '{largest}' of {most}, and batches of {batch_size:,} rows do not "
            f"fit in the {each} of each of {cluster.world_size} ranks; expected more ranks, smaller batches, fewer "
            "dimensions, or fewer rows (`recpress hash`)"
        ) from error


def planner(
    model: nn.Module,
    cluster: Topology,
    *,
    batch_size: int,
    sharding_types: Mapping[str, str] | None = None,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner as training uses it, for existing or hypothetical ranks (`recpress plan`)."""
    tables = _tables(model, cluster.compute_device)
    even = sum(table.nbytes for table in tables.values()) / cluster.world_size
    storage = cluster.devices[0].storage
    memory = storage.hbm if cluster.compute_device == "cuda" else storage.ddr
    most = max(2 * even, LARGE * (1 - RESERVED) * memory)
    constraints = {}
    for name, table in tables.items():
        types = list(SHARDING_TYPES)
        if name in (sharding_types or {}):
            types = [(sharding_types or {})[name]]
        elif cluster.world_size == 1 and cluster.compute_device == "cuda":
            # sharded by rows, TorchRec's exchange of ids waits for the GPU in each step, even with a single rank
            types = [ShardingType.TABLE_WISE.value]
        elif table.nbytes > most and cluster.world_size > 1:
            local = cluster.local_world_size
            types = [_ROW_WISE] + [_NODE_WISE] * (local < cluster.world_size and table.nbytes <= most * local)
        if table.storage in QUANTIZED:  # a row has one scale, so it is not split
            types = [t for t in types if t != ShardingType.COLUMN_WISE.value]
        constraints[name] = ParameterConstraints(
            sharding_types=types,
            compute_kernels=["fused"],
            # looked-up vectors are float32 for any storage
            output_dtype=None if table.storage in (None, "fp32") else DataType.FP32,
        )
    return EmbeddingShardingPlanner(
        topology=cluster,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
    )


@dataclass(frozen=True)
class _Table:
    nbytes: int
    """With optimizer state."""
    storage: Storage | None
    """None: trainable."""


def _tables(model: nn.Module, device_type: str) -> dict[str, _Table]:
    found: dict[str, _Table] = {}
    for module in model.modules():
        if isinstance(module, HasFrozenTables):
            for t in module.tables():
                found[t.name] = _Table(t.rows * stored_row_bytes(t.storage, t.dim, device_type), t.storage)
        elif isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                found[config.name] = _Table(4 * config.num_embeddings * (config.embedding_dim + 1), None)
        elif isinstance(module, EmbeddingCollection):
            for sequence in module.embedding_configs():
                found[sequence.name] = _Table(4 * sequence.num_embeddings * (sequence.embedding_dim + 1), None)
    return found


def shard(
    model: nn.Module,
    device: torch.device,
    *,
    batch_size: int,
    learning_rate: float = 0.01,
    optimizer: TableOptimizer = "row-wise-adagrad",
    learning_rates: Mapping[str, float] | None = None,
    sharding_types: Mapping[str, str] | None = None,
    seed: int = 0,
    communication: CommunicationConfig = FP32,
) -> DistributedModelParallel:
    """Shard the tables of `model` (on the device "meta") and replicate the rest.

    Initializes trainable tables by `seed` and rank.

    Args:
        learning_rates: table name -> learning rate, for tables with one that is not `learning_rate`.

    Raises:
        InputError: the tables do not fit in memory; the ranks cannot communicate in this precision.
    """
    if communication != FP32:
        check_communication(communication, device)
    table_sharders = sharders(learning_rate, optimizer, communication=communication)
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            bags = isinstance(module, EmbeddingBagCollection)
            tables: nn.ModuleDict = module.embedding_bags if bags else module.embeddings
            for name in (learning_rates or {}).keys() & tables.keys():
                weight: Any = tables[name].weight
                weight._optimizer_kwargs = [{"lr": (learning_rates or {})[name]}]
    layout = plan(model, device, batch_size=batch_size, sharding_types=sharding_types, table_sharders=table_sharders)
    if communication != FP32 and dist.get_world_size() > 1 and dist.get_rank() == 0:
        now, full = (bytes_per_vector(model, layout, each, dist.get_world_size()) for each in (communication, FP32))
        of_sums = " (those of tables that are sharded by rows in fp16)" if communication.forward == "int8" else ""
        logger.info(
            f"vectors cross ranks in {communication.forward}{of_sums}, their gradients in {communication.backward}: "
            f"{now:,.0f} bytes for a vector of each feature in place of {full:,.0f}"
        )
    torch.manual_seed(seed * 65_537 + dist.get_rank())
    # By default DDP rebuilds its buckets after the first step. With more than two ranks, sums then have another order,
    # and the first step of a resumed run would differ in the last bit from that of an uninterrupted run.
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)
    return DistributedModelParallel(
        model, device=device, plan=layout, sharders=table_sharders, data_parallel_wrapper=wrapper
    )
