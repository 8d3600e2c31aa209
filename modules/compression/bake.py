"""Turns a compressed model into a plain TorchRec model: frozen rows are parameters, maps are buffers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import DataType
from torchrec.quant import embedding_modules as quantized

from recpress.modules.compression.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    CompressedFeatureProcessed,
    join_sequences,
)
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.map_ids import map_ids

torch.fx.wrap("map_ids")
torch.fx.wrap("join_sequences")

_META = torch.device("meta")


class IdLookup(nn.Module):
    """The maps of a `LearnedHash` as buffers: KeyedJaggedTensor -> KeyedJaggedTensor."""

    rows: torch.Tensor
    weights: torch.Tensor

    def __init__(self, hashes: LearnedHash) -> None:
        super().__init__()
        self.register_buffer("rows", hashes.rows.clone())
        self.register_buffer("weights", hashes.weights.clone())
        self._options = (*hashes.options(), hashes.unknown == "error")

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return map_ids(features, self.rows, self.weights, *self._options)


class MappedBags(nn.Module):
    """A plain collection of pooled vectors behind maps."""

    def __init__(self, maps: IdLookup, tables: nn.Module) -> None:
        super().__init__()
        self.maps, self.tables = maps, tables

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.tables(self.maps(features))


class MappedSequences(nn.Module):
    """A plain EmbeddingCollection behind maps, and the sum of the rows of an id after it."""

    def __init__(self, maps: IdLookup, tables: EmbeddingCollection, *options: Any) -> None:
        super().__init__()
        self.maps, self.tables, self._options = maps, tables, options

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        mapped = self.maps(features)
        return join_sequences(None, self.tables(mapped), features, mapped, *self._options)


def bake(model: nn.Module, collections: list[tuple[str, Any]]) -> nn.Module:
    """A copy of `model` with plain collections in place of the compressed ones (`CompressReport.bake`).

    Args:
        collections: (path, compressed collection).
    """
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule):
            raise ValueError(
                f"bake: {path or 'the model'} is a {type(module).__name__}, of which this rank has only its shards; "
                "save `model.state_dict()` by torch.distributed.checkpoint, then, in one process, build and compress "
                "the model again without DistributedModelParallel, load the checkpoint and bake that model"
            )
    for path, module in collections:
        _check(path or "the model", module)
    baked = {id(module): _baked(module) for _, module in collections}
    return copy.deepcopy(model, baked)  # takes what it finds there in place of a copy


def _check(path: str, module: Any) -> None:
    """Raise ValueError if not all rows of a collection are there."""
    for part in (module.trainable, module.frozen):
        if part is not None and type(part).__module__ == quantized.__name__:
            raise ValueError(f"bake: {path} is quantized; bake the model before, and quantize the copy")
    if module.frozen is not None:
        module.frozen.check_loaded()
    for table in module.tables():
        if table not in module.frozen_tables() and module.weight(table).device.type == "meta":
            raise ValueError(f"bake: table {table!r}: its rows are on the device 'meta'; load them first")


def _baked(module: Any) -> nn.Module:
    if isinstance(module, CompressedFeatureProcessed):
        assert module.hashes is not None
        return MappedBags(IdLookup(module.hashes), copy.deepcopy(module.trainable))
    if isinstance(module, CompressedEmbeddingBagCollection):
        bags = EmbeddingBagCollection(_configs(module), is_weighted=module.is_weighted(), device=_META)
        _fill(bags, bags.embedding_bags, module)
        return bags if module.hashes is None else MappedBags(IdLookup(module.hashes), bags)
    assert isinstance(module, CompressedEmbeddingCollection)
    direct = module.hashes is None
    tables = EmbeddingCollection(_configs(module), device=_META, need_indices=direct and module.need_indices())
    _fill(tables, tables.embeddings, module)
    if module.hashes is None:
        return tables
    return MappedSequences(IdLookup(module.hashes), tables, *module.join_options(all_trainable=True))


def _configs(module: Any) -> list[Any]:
    """The tables, with frozen ones as float32."""
    frozen = set(module.frozen_tables())
    return [replace(c, data_type=DataType.FP32) if c.name in frozen else replace(c) for c in module._configs]


def _fill(tables: Any, by_name: nn.ModuleDict, module: Any) -> None:
    """Copy all rows, frozen ones decoded."""
    tables._device = module.device
    frozen = set(module.frozen_tables())
    for config in module._configs:
        name = config.name
        rows = module.frozen.whole(name, config.embedding_dim) if name in frozen else module.weight(name)
        table: Any = by_name[name]
        table.weight = nn.Parameter(rows.detach().clone(memory_format=torch.contiguous_format), name not in frozen)
