"""Options of the models that `recpress train --model` names, but the two-tower network. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from recpress.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """TorchRec's DLRM: dot products of all pairs of embeddings."""

    dense_layers: tuple[int, ...] = (64,)
    """Widths of the network of the floats, before its last layer, which has the dimension of the embeddings."""
    over_layers: tuple[int, ...] = (128, 64)
    """Widths of the network on the interactions, before its output."""

    def __post_init__(self) -> None:
        for name in ("dense_layers", "over_layers"):
            if any(width < 1 for width in getattr(self, name)):
                raise InputError(f"model.{name}: expected widths of at least 1")


@dataclass(frozen=True, kw_only=True)
class DCNConfig(DLRMConfig):
    """TorchRec's DLRM_DCN: a low-rank cross network (DCN-v2) on the embeddings."""

    cross_layers: int = 3
    """Layers of the cross network."""
    low_rank: int = 32
    """Rank of their weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cross_layers", "low_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}, expected at least 1")
