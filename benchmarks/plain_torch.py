"""The two-tower network in plain PyTorch: nn.EmbeddingBag tables, DistributedDataParallel, torch.optim; no TorchRec.

Towers, loss and batches are those of `TwoTower`; only the source of the ids' vectors differs. Tables are replicated on
every rank. TorchRec's row-wise Adagrad has no counterpart in torch.optim, so that tables use Adagrad, with a state per
value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from recpress.modules.config import TwoTowerConfig
from recpress.modules.two_tower.model import SideSpec, TwoTower, rows_key
from recpress.trainer.config import OptimizerConfig


class PlainTables(nn.Module):
    """What an EmbeddingBagCollection of one table is in plain PyTorch.

    Args:
        key: feature key of the ids in the KeyedJaggedTensor.
        rows, dim: of the table.
        sparse: whether a step's gradient has the rows of its batch alone, or all of them.
        frozen: no gradient.
    """

    def __init__(self, key: str, rows: int, dim: int, *, sparse: bool, frozen: bool) -> None:
        super().__init__()
        self.key = key
        self.bags = nn.EmbeddingBag(rows, dim, mode="sum", sparse=sparse)
        nn.init.uniform_(self.bags.weight, -(dim**-0.5), dim**-0.5)
        self.bags.weight.requires_grad_(not frozen)

    def forward(self, features: KeyedJaggedTensor) -> Mapping[str, torch.Tensor]:
        """{key: (B, dim)}"""
        ids = features[self.key]
        return {self.key: self.bags(ids.values(), ids.offsets()[:-1])}


class PlainTwoTower:
    """The network under DistributedDataParallel, and its two optimizers. Collective.

    Args:
        frozen: tables without gradients.
        sparse: see `PlainTables`.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        user: SideSpec,
        item: SideSpec,
        optimizer: OptimizerConfig,
        device: torch.device,
        *,
        frozen: bool,
        sparse: bool,
    ) -> None:
        model = TwoTower(config, user, item, tables_device="meta")
        for side, spec in (("user", user), ("item", item)):
            rows = spec.rows if spec.map is None else spec.map.num_rows
            key = spec.key if spec.map is None else rows_key(spec.key)
            dim = getattr(model, f"{side}_tower").given.dim
            tables = PlainTables(key, rows, dim, sparse=sparse, frozen=frozen)
            setattr(model, f"{side}_frozen" if frozen else f"{side}_tables", tables)
        model.to(device)
        place = [device] if device.type == "cuda" else None
        # Maps are buffers, and the same on all ranks: nothing to send before each step.
        self.model = nn.parallel.DistributedDataParallel(model, device_ids=place, broadcast_buffers=False)
        tables_of = [p for n, p in model.named_parameters() if ".bags." in n and p.requires_grad]
        others = [p for n, p in model.named_parameters() if ".bags." not in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay, fused=True)
        ]
        if tables_of:
            self.optimizers.append(torch.optim.Adagrad(tables_of, lr=optimizer.table_learning_rate, eps=1e-8))

    def train(self, batches: Iterable[Any]) -> None:
        """The loop that anybody would write."""
        self.model.train()
        for batch in batches:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss, _ = self.model(batch)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
