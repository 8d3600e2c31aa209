"""Frozen tables in `torchrec.inference.modules.quantize_inference_model`: they become TorchRec's quantized collections.

A table stays as stored if it has fewer bits than it would get. TorchRec's `shard_quant_model` then shards it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchrec.inference.modules import DEFAULT_QUANT_MAPPING
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, DataType
from torchrec.quant.embedding_modules import (
    DEFAULT_ROW_ALIGNMENT,
    MODULE_ATTR_CACHE_FEATURES_ORDER,
    MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    MODULE_ATTR_REGISTER_TBES_BOOL,
    MODULE_ATTR_ROW_ALIGNMENT_INT,
    _update_embedding_configs,
)
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from recpress.modules.frozen.kernel import DATA_TYPE, HALF_SCALE_BYTES, FrozenKernel, decode_rows, from_half_scale
from recpress.modules.row_source import BLOCK_BYTES


class QuantizedFrozenBags(nn.Module):
    """Makes TorchRec's quantized EmbeddingBagCollection of a FrozenEmbeddingBagCollection."""

    @classmethod
    def from_float(cls, module: Any, use_precomputed_fake_quant: bool = False) -> QuantEmbeddingBagCollection:
        configs, options = _converted(module, module.embedding_bag_configs())
        return QuantEmbeddingBagCollection(configs, module.is_weighted(), **options)


class QuantizedFrozenSequences(nn.Module):
    """Makes TorchRec's quantized EmbeddingCollection of a FrozenEmbeddingCollection."""

    @classmethod
    def from_float(cls, module: Any, use_precomputed_fake_quant: bool = False) -> QuantEmbeddingCollection:
        configs, options = _converted(module, module.embedding_configs())
        return QuantEmbeddingCollection(configs, need_indices=module.need_indices(), **options)


def register_quantized(frozen: type[nn.Module], quantized: type[nn.Module]) -> None:
    """`quantize_inference_model` converts modules of type `frozen` by `quantized.from_float`."""
    DEFAULT_QUANT_MAPPING[torch.typename(frozen)] = quantized


def _converted(module: Any, configs: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """(the tables with their new data type, the arguments of TorchRec's collection)."""
    module.check_loaded()
    configs = copy.deepcopy(configs)
    _update_embedding_configs(configs, module.qconfig)
    weights = {}
    for config, table, kernel in zip(configs, module.tables(), module.kernels(), strict=True):
        stored = DATA_TYPE[table.storage]
        if DATA_TYPE_NUM_BITS[stored] < DATA_TYPE_NUM_BITS[config.data_type]:
            config.data_type = stored
        weights[table.name] = _encoded(kernel, config.data_type)
    return configs, {
        "device": module.device,
        "output_dtype": module.qconfig.activation().dtype,
        "table_name_to_quantized_weights": weights,
        "register_tbes": getattr(module, MODULE_ATTR_REGISTER_TBES_BOOL, False),
        "quant_state_dict_split_scale_bias": getattr(module, MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS, False),
        "row_alignment": getattr(module, MODULE_ATTR_ROW_ALIGNMENT_INT, DEFAULT_ROW_ALIGNMENT),
        "cache_features_order": getattr(module, MODULE_ATTR_CACHE_FEATURES_ORDER, False),
    }


def _encoded(kernel: FrozenKernel, kind: DataType) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, scales and offsets) of a table as TorchRec stores them: uint8; a float table has no second part."""
    stored = kernel.stored(0)
    if DATA_TYPE[kernel.storage] == kind:
        if kind == DataType.INT4 or kernel.half_scale:
            return stored[:, HALF_SCALE_BYTES:], stored[:, :HALF_SCALE_BYTES]
        if kind in (DataType.FP32, DataType.FP16):
            return stored.view(torch.uint8), None
    rows, width = len(stored), kernel.shards[0].columns[1] - kernel.shards[0].columns[0]
    parts = []
    step = max(1, BLOCK_BYTES // (4 * width))
    for first in range(0, rows, step):
        part = stored[first : first + step]
        block = decode_rows(from_half_scale(part) if kernel.half_scale else part, kernel.storage)
        if kind == DataType.FP16:
            parts.append(block.half().view(torch.uint8))
        else:
            bits = DATA_TYPE_NUM_BITS[kind]
            parts.append(torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(block, bits))
    encoded = torch.cat(parts)
    if kind == DataType.FP16:
        return encoded, None
    return encoded[:, :-HALF_SCALE_BYTES], encoded[:, -HALF_SCALE_BYTES:]
