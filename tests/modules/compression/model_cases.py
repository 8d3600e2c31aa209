"""Models, maps and batches for the tests of compression."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.compression.replace import compress
from recpress.modules.hashing.id_map import IdMap

DIM, IDS = 8, 40


FEATURES = {"t0": ["f0"], "t1": ["f1", "f1b"], "t2": ["f2"], "t3": ["f3"]}


def id_map(
    num_rows: int = 10, rows_per_id: int = 1, weighted: bool = False, num_ids: int = IDS, seed: int = 0
) -> IdMap:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(0, num_rows, (num_ids, rows_per_id)).astype(np.int32))
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (num_ids, rows_per_id)).astype(np.float32)) if weighted else None
    return IdMap(rows=rows, num_rows=num_rows, weights=weights)


def one_row_each(num_ids: int = IDS) -> IdMap:
    """Each id has a row of its own, in another order: compression that loses nothing."""
    rows = torch.randperm(num_ids, generator=torch.Generator().manual_seed(3)).int()[:, None]
    return IdMap(rows=rows, num_rows=num_ids)


def collection(dim: int = DIM, pooling: PoolingType = PoolingType.SUM, **options: Any) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=t, num_embeddings=IDS, embedding_dim=dim, feature_names=list(f), pooling=pooling)
            for t, f in FEATURES.items()
        ],
        **options,
    )


def dlrm(kind: str = "dlrm", device: str = "cpu") -> nn.Module:
    tables = collection(device=torch.device(device))
    common = {"dense_in_features": 3, "dense_arch_layer_sizes": [8, DIM], "over_arch_layer_sizes": [8, 1]}
    if kind == "dcn":
        return DLRM_DCN(tables, dcn_num_layers=1, dcn_low_rank_dim=4, **common)
    return DLRM(tables, **common)


def made(seed: int = 0, rows: int = 4, weights: bool = False) -> KeyedJaggedTensor:
    rng = np.random.default_rng(seed)
    keys = ["f3", "f1b", "f0", "f2", "f1"]
    lengths = torch.from_numpy(rng.integers(0, 4, len(keys) * rows).astype(np.int32))
    values = torch.from_numpy(rng.integers(0, IDS, int(lengths.sum())))
    given = torch.from_numpy(rng.random(len(values)).astype(np.float32)) if weights else None
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=given)


def source(rows: int = IDS, dim: int = DIM) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).normal(size=(rows, dim)).astype(np.float32))


class Train(nn.Module):
    """A DLRM and its loss; takes one KeyedJaggedTensor as batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dense = nn.Parameter(torch.ones(1, 3))

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(self.dense.expand(4, 3), features)
        return (logits**2).mean(), logits.detach()


def compressed(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    maps = {"t0": id_map(12, rows_per_id=2), "t1": id_map(10), "t3": id_map(9)}
    model, report = compress(Train(dlrm(kind)), maps, {"t2": source(), "t3": source()})
    return model, report
