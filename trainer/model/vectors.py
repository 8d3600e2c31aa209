"""Vectors of all users or items, in row blocks over the ranks, for evaluation and export."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from recpress.data.dataset.log import Side
from recpress.modules.als.factors import RowBlocks
from recpress.modules.two_tower.logistic import LogisticMF
from recpress.modules.two_tower.model import TwoTower

VectorFn = Callable[[torch.Tensor], torch.Tensor]
"""ids (B,) int64 -> vectors (B, D), with a constant B. May be collective: all ranks call it equally often."""
Inputs = Callable[[torch.Tensor], tuple[KeyedJaggedTensor, torch.Tensor | None]]
"""Ids (n,) -> (features of these ids, stride n; their float features (n, F) or None)."""


def tower_vectors(
    model: TwoTower | LogisticMF,
    side: Side,
    *,
    device: torch.device,
    inputs: Inputs | None = None,
    chunk: int = 65_536,
) -> torch.Tensor:
    """The vectors of this rank's block of the ids of a side: (rows, d) float32, on the CPU. Collective.

    Args:
        model: the module inside DistributedModelParallel (`dmp.module`), out of the pipeline, in eval mode.
        inputs: features of ids, if the model uses more than the ids.
    """
    spec = model.user if side == "user" else model.item
    vectors = model.user_vectors if side == "user" else model.item_vectors
    cut = RowBlocks(spec.rows, dist.get_world_size())
    start, stop = cut.start(dist.get_rank()), cut.stop(dist.get_rank())
    parts = []
    # All ranks make as many calls as the largest block needs; results for ids past the end of a block are dropped.
    for first in range(start, start + cut.block, chunk):
        ids = torch.arange(first, min(first + chunk, start + cut.block), device=device).clamp_(max=spec.rows - 1)
        features, floats = inputs(ids) if inputs else (id_features(spec.key, ids), None)
        take = max(0, min(first + chunk, stop) - first)
        parts.append(vectors(features, floats)[:take].float().cpu())
    return torch.cat(parts)


def id_features(key: str, ids: torch.Tensor) -> KeyedJaggedTensor:
    """One id per bag."""
    return KeyedJaggedTensor.from_lengths_sync([key], ids, torch.ones_like(ids, dtype=torch.int32))
