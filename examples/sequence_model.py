"""A model of sequences for `recpress train --model sequence_model:make`: attention of an item over its user's history.

    recpress train --config sequence.toml --model sequence_model:make --data runs/log --out runs/model

with the features `item_id` and `history` of one table (docs/train/models.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchrec.datasets.utils import Batch

from recpress.trainer.model.inputs import ModelInputs


@dataclass(frozen=True)
class Config:
    item: str = "item_id"
    """Feature of the item."""
    history: str = "history"
    """Feature of the user's last items, of the same table."""
    max_length: int = 20
    """The last items that count."""
    hidden: int = 32
    """Width of the layer on top."""


class SequenceModel(nn.Module):
    def __init__(self, config: Config, inputs: ModelInputs) -> None:
        super().__init__()
        self.config = config
        self.vectors = inputs.sequences(config.item, config.history)  # one vector per id, not pooled
        dim = self.vectors.embedding_dim()
        self.top = nn.Sequential(nn.Linear(3 * dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, probabilities (B,))."""
        found = self.vectors(batch.sparse_features)
        item = found[self.config.item].to_padded_dense(1).squeeze(1)  # (B, dim)
        history = found[self.config.history]
        keys = history.to_padded_dense(self.config.max_length)  # (B, max_length, dim), zeros behind the last item
        length = history.lengths().unsqueeze(1)
        known = torch.arange(self.config.max_length, device=length.device) < length
        scores = (keys @ item.unsqueeze(2)).squeeze(2).masked_fill(~known, -1e4)
        taste = (scores.softmax(1).unsqueeze(1) @ keys).squeeze(1)  # zeros without a history
        logits = self.top(torch.cat([item, taste, item * taste], 1)).squeeze(1).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.sigmoid()


def make(config: Config, inputs: ModelInputs) -> nn.Module:
    return SequenceModel(config, inputs)
