"""The two-tower network: tables, towers, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from recpress.modules.config import TwoTowerConfig
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable
from recpress.modules.losses import make_loss
from recpress.modules.rows import RowSource, load_trainable, round_up
from recpress.modules.towers import Source, Tower
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor


@dataclass(frozen=True, kw_only=True)
class SideSpec:
    """What is known of users, or of items."""

    key: str
    """Feature key of the id in the KeyedJaggedTensor."""
    rows: int
    """Number of ids."""
    dim: int | None = None
    """Dimension of the factors; None where there are none (`random`)."""
    extra: int = 0
    """Dimension of a second frozen vector of the id, e.g. its log count: input to the tower alone."""
    categorical: Mapping[str, int] = field(default_factory=dict)
    """Further categorical features: key -> number of values."""
    floats: int = 0
    """Number of further float features."""


class TwoTower(nn.Module):
    """score(u, i) = user tower(u) . item tower(i).

    Tables by `config.tables.strategy`: `random` and `init-train` train the id tables, `init-freeze` keeps
    them frozen in a collection of their own, `init-freeze-plus` adds a small trainable table of the ids to
    the frozen one. Factors are loaded by `load_factors`, after sharding. With tables_device="meta" the module
    is only to be sharded.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        user: SideSpec,
        item: SideSpec,
        tables_device: torch.device | str = "cpu",
    ) -> None:
        """
        Raises:
            ValueError: a strategy without factors to start from; vectors of users and items that differ in
                length.
        """
        super().__init__()
        self.config, self.user, self.item = config, user, item
        device = torch.device(tables_device)
        self.user_frozen, self.user_tables, self.user_tower = _side("user", config, user, device)
        self.item_frozen, self.item_tables, self.item_tower = _side("item", config, item, device)
        if self.user_tower.out_dim != self.item_tower.out_dim:
            raise ValueError(
                f"user vectors have length {self.user_tower.out_dim}, expected that of item vectors, "
                f"{self.item_tower.out_dim}"
            )
        self.loss = make_loss(config.loss)
        self.item_ids = _Ids(item.key)

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss to differentiate, the same detached); what TrainPipelineSparseDist expects.

        Args:
            batch: `user_features` KeyedJaggedTensor of stride B, `item_features` of stride B * (1 + N)
                (layout in `losses`), `label` (B,), `log_q` (B * (1 + N),), and where there are float features
                `user_floats` (B, F) and `item_floats` (B * (1 + N), F).
        """
        users = self.user_tower(
            self.user_frozen(batch.user_features) if self.user_frozen is not None else None,
            self.user_tables(batch.user_features) if self.user_tables is not None else None,
            batch.user_floats if self.user.floats else None,
        )
        items = self.item_tower(
            self.item_frozen(batch.item_features) if self.item_frozen is not None else None,
            self.item_tables(batch.item_features) if self.item_tables is not None else None,
            batch.item_floats if self.item.floats else None,
        )
        loss = self.loss(users, items, batch.label, batch.log_q, self.item_ids(batch.item_features))
        return loss, loss.detach()

    @torch.no_grad()
    def user_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective where the tables are sharded: every rank calls it equally often."""
        frozen = self.user_frozen(features) if self.user_frozen is not None else None
        tables = self.user_tables(features) if self.user_tables is not None else None
        return self.user_tower(frozen, tables, floats)

    @torch.no_grad()
    def item_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective where the tables are sharded: every rank calls it equally often."""
        frozen = self.item_frozen(features) if self.item_frozen is not None else None
        tables = self.item_tables(features) if self.item_tables is not None else None
        return self.item_tower(frozen, tables, floats)

    def load_factors(self, user: RowSource, item: RowSource) -> None:
        """Fill the id tables, each rank its own shards; call it after sharding, and again to swap factors.

        Raises:
            ValueError: shapes or values do not fit.
        """
        assert self.config.tables.strategy != "random", "random tables take no factors"
        for side, source, frozen, tables in (
            ("user", user, self.user_frozen, self.user_tables),
            ("item", item, self.item_frozen, self.item_tables),
        ):
            if self.config.tables.strategy == "init-train":
                load_trainable(tables, side, source)
            else:
                frozen.load(side, source)

    def load_extra(self, user: RowSource | None = None, item: RowSource | None = None) -> None:
        """Fill the second frozen vectors (`SideSpec.extra`)."""
        if user is not None:
            self.user_frozen.load("user_extra", user)
        if item is not None:
            self.item_frozen.load("item_extra", item)


class _Ids(nn.Module):
    """The ids of one feature of a KeyedJaggedTensor that has one id in each bag."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return features[self.key].values()


def _side(
    name: str, config: TwoTowerConfig, spec: SideSpec, device: torch.device
) -> tuple[FrozenEmbeddingBagCollection | None, EmbeddingBagCollection | None, Tower]:
    strategy = config.tables.strategy
    if strategy != "random" and spec.dim is None:
        raise ValueError(f"strategy {strategy!r} starts from factors, and none are given for {name}s")
    frozen: list[FrozenTable] = []
    trained: list[EmbeddingBagConfig] = []
    others: list[tuple[Source, int]] = []
    base: Source
    if strategy in ("init-freeze", "init-freeze-plus"):
        dim = round_up(spec.dim or 0)
        frozen.append(
            FrozenTable(
                name=name, rows=spec.rows, dim=dim, features=(spec.key,), storage=config.tables.storage
            )
        )
        base = ("frozen", f"{spec.key}@{name}" if spec.extra else spec.key)
    else:
        dim = round_up(config.tables.dim if strategy == "random" else spec.dim or 0)
        trained.append(_table(name, spec.rows, dim, spec.key))
        base = ("tables", spec.key)
    if spec.extra:
        extra = f"{name}_extra"
        width = round_up(spec.extra)
        frozen.append(FrozenTable(name=extra, rows=spec.rows, dim=width, features=(spec.key,)))
        others.append((("frozen", f"{spec.key}@{extra}" if len(frozen) > 1 else spec.key), width))
    if strategy == "init-freeze-plus":
        width = round_up(config.tables.plus_dim)
        trained.append(_table(f"{name}_plus", spec.rows, width, spec.key))
        others.append((("tables", spec.key), width))
    for key, values in spec.categorical.items():
        width = round_up(config.towers.feature_dim)
        trained.append(_table(f"{name}_{key}", values, width, key))
        others.append((("tables", key), width))
    tower = Tower(config.towers, base=base, dim=dim, others=others, floats=spec.floats)
    return (
        FrozenEmbeddingBagCollection(frozen, device=device) if frozen else None,
        EmbeddingBagCollection(tables=trained, device=device) if trained else None,
        tower,
    )


def _table(name: str, rows: int, dim: int, key: str) -> EmbeddingBagConfig:
    bound = dim**-0.5  # TorchRec's default, 1 / sqrt(rows), leaves large tables at zero
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=[key],
        weight_init_min=-bound,
        weight_init_max=bound,
    )
