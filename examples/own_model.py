"""A model of your own in `recpress train`: DeepFM (Guo et al., 2017) over the features of a log.

recpress train --model examples.own_model:make --data runs/criteo --out runs/deepfm --model.hidden 64 32

`make` gets the options of the command line, here `Config`, and the features of the log. It returns a module that maps
a batch to (loss, probabilities). The trainer shards the tables and does the rest: checkpoints, resume, metrics.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torchrec import EmbeddingBagCollection

from recpress.trainer.model.inputs import ModelInputs


@dataclass(frozen=True)
class Config:
    """DeepFM."""

    hidden: tuple[int, ...] = (64, 32)
    """Widths of the deep part."""
    dropout: float = 0.1
    """Dropout rate of the deep part."""


class DeepFM(nn.Module):
    def __init__(self, config: Config, inputs: ModelInputs) -> None:
        super().__init__()
        self.keys, self.dim = inputs.keys, inputs.dim
        self.vectors = inputs.embedding_bags()
        first = [replace(t, name=f"{t.name}_first", embedding_dim=4) for t in inputs.tables]
        self.first = EmbeddingBagCollection(first, device=torch.device("meta"))
        width = len(self.keys) * self.dim + len(inputs.floats)
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        found = self.vectors(batch.sparse_features)
        vectors = torch.stack([found[key] for key in self.keys], 1)  # (B, keys, dim)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        first = self.first(batch.sparse_features).values().sum(1)
        deep = self.deep(torch.cat([vectors.flatten(1), batch.dense_features], 1)).squeeze(1)
        logits = (self.bias + first + pairs + deep).float()  # --precision bf16 has the loss in float32, too
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.sigmoid()


def make(config: Config, inputs: ModelInputs) -> nn.Module:
    return DeepFM(config, inputs)
