"""Logistic matrix factorization as a TorchRec model: sigmoid(u . v + b_u + b_v + b), cross-entropy, sampled negatives.

This is the factorization of CADC (Entezari Zarch et al. 2024). A row of a table is a vector followed by its bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from recpress.modules.config import LogisticConfig
from recpress.modules.row_source import round_up
from recpress.modules.two_tower.model import SideSpec


class LogisticMF(nn.Module):
    """The model. `user_vectors` and `item_vectors` include the biases, so that u' . v' is the logit:

    u' = (u, b_u + b, 1), v' = (v, 1, b_v).
    """

    def __init__(
        self,
        config: LogisticConfig,
        user: SideSpec,
        item: SideSpec,
        tables_device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            user, item: `key` and `rows` are used.
        """
        super().__init__()
        self.config, self.user, self.item = config, user, item
        device = torch.device(tables_device)
        self.user_tables = _table("user", config, user, device)
        self.item_tables = _table("item", config, item, device)
        self.head = _Head(config)

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, its cross-entropy part, detached) of a batch (`losses`). Each example has its own negatives."""
        loss = self.head(self.user_tables(batch.user_features), self.item_tables(batch.item_features), batch.label)
        return loss[0], loss[1]

    @torch.no_grad()
    def user_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """u' (B, factors + 2). Collective if the tables are sharded."""
        vector, bias = self.head.cut(self.user_tables(features)[self.user.key])
        return torch.cat([vector, bias + self.head.bias, torch.ones_like(bias)], 1)

    @torch.no_grad()
    def item_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """v' (B, factors + 2). Collective if the tables are sharded."""
        vector, bias = self.head.cut(self.item_tables(features)[self.item.key])
        return torch.cat([vector, torch.ones_like(bias), bias], 1)


class _Head(nn.Module):
    """Cross-entropy and L2 penalty of table outputs."""

    def __init__(self, config: LogisticConfig) -> None:
        super().__init__()
        self.factors, self.weight_decay = config.factors, config.weight_decay
        self.bias = nn.Parameter(torch.zeros(()))

    def cut(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a table -> vectors (B, factors), biases (B, 1)."""
        return rows[:, : self.factors], rows[:, self.factors : self.factors + 1]

    def forward(self, users: Any, items: Any, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        user, user_bias = self.cut(users.values())
        item, item_bias = self.cut(items.values())
        rows = label.shape[0]
        positive, negative = item.split([rows, item.shape[0] - rows])
        of_positive, of_negative = item_bias.split([rows, item.shape[0] - rows])
        count = item.shape[0] // rows - 1
        own = negative.view(rows, count, self.factors)
        offset = user_bias + self.bias
        for_positive = (user * positive).sum(1) + offset[:, 0] + of_positive[:, 0]
        for_negative = (user[:, None] * own).sum(2) + offset + of_negative.view(rows, count)
        # softplus(x) - y x is the cross-entropy of sigmoid(x) against y
        total = (F.softplus(for_positive) - label * for_positive).sum() + F.softplus(for_negative).sum()
        entropy = total / items.values().shape[0]
        squares = user.square().sum() / rows + item.square().sum() / item.shape[0]
        return entropy + 0.5 * self.weight_decay * squares, entropy.detach()


def _table(name: str, config: LogisticConfig, spec: SideSpec, device: torch.device) -> EmbeddingBagCollection:
    bound = 0.5 * config.factors**-0.5  # initial scores of about 0.05 in any dimension
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=spec.rows,
                embedding_dim=round_up(config.factors + 1),
                feature_names=[spec.key],
                weight_init_min=-bound,
                weight_init_max=bound,
            )
        ],
        device=device,
    )
