"""The sharders for a planner and DistributedModelParallel: TorchRec's own, and those of compressed models."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.mc_modules import ManagedCollisionCollectionSharder
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs, ShardingType

from recpress.modules.compression.collections import LOADED, PENDING
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollectionSharder
from recpress.modules.frozen.sequence import FrozenEmbeddingCollectionSharder
from recpress.modules.row_source import PendingRows, load_rows


def sharders(
    fused_params: dict[str, Any] | None = None,
    *,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    device_type: str = "",
) -> list[ModuleSharder[Any]]:
    """All sharders: pass the same list to `EmbeddingShardingPlanner.collective_plan` and DistributedModelParallel.

    They are TorchRec's default sharders, with these differences: compressed tables load the rows given to `compress`
    when they are sharded, frozen tables are sharded, and row-wise sharding is offered on CPU too.

    Args:
        fused_params: options of trainable tables, as in EmbeddingBagCollectionSharder.
        qcomm_codecs_registry: codecs of quantized communication, for all tables.
        device_type: device to plan for, "cpu" or "cuda". Default: CUDA if this machine has it.
    """
    codecs = qcomm_codecs_registry
    bags = _BagSharder(fused_params, codecs)
    sequences = _SequenceSharder(fused_params, codecs)
    collisions = ManagedCollisionCollectionSharder()
    own: list[Any] = [
        bags,
        sequences,
        FeatureProcessedEmbeddingBagCollectionSharder(bags, codecs),
        _CollisionBagSharder(bags, collisions, qcomm_codecs_registry=codecs),
        _CollisionSequenceSharder(sequences, collisions, qcomm_codecs_registry=codecs),
        FrozenEmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs, planned_device=device_type),
        FrozenEmbeddingCollectionSharder(qcomm_codecs_registry=codecs, planned_device=device_type),
    ]
    types = {sharder.module_type for sharder in own}
    return [*own, *(s for s in get_default_sharders() if s.module_type not in types)]


def _load(module: Any, sharded: Any, group: str) -> Any:
    """Load the rows that wait for a collection to be sharded; each rank reads its own shards."""
    pending: PendingRows | None = getattr(module, PENDING, None)
    if pending is not None:
        weights = sharded.state_dict()
        for table, source in pending.sources.items():
            load_rows(weights[f"{group}.{table}.weight"], table, source)
        setattr(sharded, LOADED, True)
    return sharded


class _BagSharder(EmbeddingBagCollectionSharder):
    def shard(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return _load(module, super().shard(module, *args, **kwargs), "embedding_bags")

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        rows = [t.value for t in (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE)]
        return [*types, *(t for t in rows if t not in types)]


class _SequenceSharder(EmbeddingCollectionSharder):
    def shard(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return _load(module, super().shard(module, *args, **kwargs), "embeddings")


class _OnCpu:
    """TorchRec's planner has no estimates of the kernels that it offers collision modules on CPU."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        found: Any = super()
        kernels: list[str] = found.compute_kernels(sharding_type, compute_device_type)
        return ["fused"] if compute_device_type == "cpu" else kernels


class _CollisionBagSharder(_OnCpu, ManagedCollisionEmbeddingBagCollectionSharder):
    pass


class _CollisionSequenceSharder(_OnCpu, ManagedCollisionEmbeddingCollectionSharder):
    pass
