"""TorchRec's DLRM and DLRM_DCN as models of `recpress train`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRM_DCN

from recpress.trainer.model.config import DCNConfig, DLRMConfig
from recpress.trainer.model.inputs import ModelInputs


class ClickModel(nn.Module):
    """Cross-entropy of a network that maps (dense, sparse features) to logits (B, 1).

    Args:
        constant: the batches have no floats; a constant takes their place.
    """

    def __init__(self, network: nn.Module, *, constant: bool = False) -> None:
        super().__init__()
        self.network, self.constant = network, constant

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, probabilities (B,))."""
        dense = batch.labels.unsqueeze(1) * 0 + 1 if self.constant else batch.dense_features
        logits = self.network(dense, batch.sparse_features).squeeze(1).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.sigmoid()


class AlignedBags(nn.Module):
    """An EmbeddingBagCollection whose outputs all have dimension `dim`, by a linear map of each table that differs.

    A map from fewer dimensions starts as the identity: dot products of two such vectors do not change.
    """

    def __init__(self, bags: EmbeddingBagCollection, dim: int) -> None:
        super().__init__()
        self.bags, self.dim = bags, dim
        self._configs = [replace(config, embedding_dim=dim) for config in bags.embedding_bag_configs()]
        self._features = [name for config in bags.embedding_bag_configs() for name in config.feature_names]
        self.maps = nn.ModuleList()
        for config in bags.embedding_bag_configs():
            for _ in config.feature_names:
                width = config.embedding_dim
                linear = nn.Identity() if width == dim else nn.Linear(width, dim, bias=False)
                if isinstance(linear, nn.Linear) and width < dim:
                    nn.init.eye_(linear.weight)
                self.maps.append(linear)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, all with dimension `dim`."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        found = self.bags(features)
        values = [linear(found[name]) for name, linear in zip(self._features, self.maps, strict=True)]
        return _keyed(self._features, self.dim, values)


@torch.fx.wrap
def _keyed(names: list[str], dim: int, values: list[torch.Tensor]) -> KeyedTensor:
    return KeyedTensor(names, [dim] * len(names), torch.cat(values, 1))


def _bags(inputs: ModelInputs) -> EmbeddingBagCollection:
    bags = inputs.embedding_bags()
    if all(table.embedding_dim == inputs.dim for table in inputs.tables):
        return bags
    return AlignedBags(bags, inputs.dim)  # DLRM needs its configs and forward only


def make_dlrm(config: DLRMConfig, inputs: ModelInputs) -> nn.Module:
    """TorchRec's DLRM."""
    network = DLRM(
        _bags(inputs),
        max(1, len(inputs.floats)),
        [*config.dense_layers, inputs.dim],
        [*config.over_layers, 1],
    )
    return ClickModel(network, constant=not inputs.floats)


def make_dcn(config: DCNConfig, inputs: ModelInputs) -> nn.Module:
    """TorchRec's DLRM_DCN."""
    network = DLRM_DCN(
        _bags(inputs),
        max(1, len(inputs.floats)),
        [*config.dense_layers, inputs.dim],
        [*config.over_layers, 1],
        dcn_num_layers=config.cross_layers,
        dcn_low_rank_dim=config.low_rank,
    )
    return ClickModel(network, constant=not inputs.floats)
