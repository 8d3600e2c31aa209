"""The two-tower network: tables, towers, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from recpress.modules.config import TwoTowerConfig
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable
from recpress.modules.losses import make_loss
from recpress.modules.rows import RowSource, load_trainable, round_up
from recpress.modules.towers import ResidualTower, Source, Tower, TowerInput, make_tower
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
    counted: bool = False
    """Whether the tower is given the id's log count: a frozen table of its own (see `load_counts`)."""
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
        self.loss = make_loss(config.loss, item.rows)
        self.item_ids = _Ids(item.key)

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss to differentiate, the same detached); what TrainPipelineSparseDist expects.

        Args:
            batch: `user_features` KeyedJaggedTensor of stride B, `item_features` (layout in `losses`),
                `label` (B,), `log_q` (items,), `excluded` (B, N) or None, and where there are float features
                `user_floats` (B, F) and `item_floats` (items, F).
        """
        users, user_penalty = self.user_tower(
            self.user_frozen(batch.user_features) if self.user_frozen is not None else None,
            self.user_tables(batch.user_features) if self.user_tables is not None else None,
            batch.user_floats if self.user.floats else None,
        )
        items, item_penalty = self.item_tower(
            self.item_frozen(batch.item_features) if self.item_frozen is not None else None,
            self.item_tables(batch.item_features) if self.item_tables is not None else None,
            batch.item_floats if self.item.floats else None,
        )
        ids = self.item_ids(batch.item_features)
        loss = self.loss(users, items, batch.label, batch.log_q, ids, batch.excluded)
        if self.config.towers.kind == "residual" and self.config.towers.penalty:
            loss = loss + self.config.towers.penalty * (user_penalty + item_penalty)
        return loss, loss.detach()

    @torch.no_grad()
    def user_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective where the tables are sharded: every rank calls it equally often."""
        frozen = self.user_frozen(features) if self.user_frozen is not None else None
        tables = self.user_tables(features) if self.user_tables is not None else None
        return self.user_tower(frozen, tables, floats)[0]

    @torch.no_grad()
    def item_vectors(self, features: KeyedJaggedTensor, floats: torch.Tensor | None = None) -> torch.Tensor:
        """(B, d). Collective where the tables are sharded: every rank calls it equally often."""
        frozen = self.item_frozen(features) if self.item_frozen is not None else None
        tables = self.item_tables(features) if self.item_tables is not None else None
        return self.item_tower(frozen, tables, floats)[0]

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
                assert tables is not None
                load_trainable(tables, side, source)
            else:
                assert frozen is not None
                frozen.load(side, source)
        self.user_tower.fit_scale(user)
        self.item_tower.fit_scale(item)

    def load_counts(self, user: RowSource, item: RowSource) -> None:
        """Fill the tables of log counts, (rows, 1) each, standardised (`rows.LogCounts`); after sharding."""
        for spec, name, source, frozen in (
            (self.user, "user_count", user, self.user_frozen),
            (self.item, "item_count", item, self.item_frozen),
        ):
            if spec.counted:
                assert frozen is not None
                frozen.load(name, source)


class _Ids(nn.Module):
    """The ids of one feature of a KeyedJaggedTensor that has one id in each bag."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return features[self.key].values()


def _side(
    name: Literal["user", "item"], config: TwoTowerConfig, spec: SideSpec, device: torch.device
) -> tuple[FrozenEmbeddingBagCollection | None, EmbeddingBagCollection | None, Tower | ResidualTower]:
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
            FrozenTable(name=name, rows=spec.rows, dim=dim, features=(spec.key,), storage=config.tables.storage)
        )
        base = ("frozen", f"{spec.key}@{name}" if spec.counted else spec.key)
    else:
        dim = round_up(config.tables.dim if strategy == "random" else spec.dim or 0)
        trained.append(_table(name, spec.rows, dim, spec.key))
        base = ("tables", spec.key)
    count: Source | None = None
    if spec.counted:
        table = f"{name}_count"
        frozen.append(FrozenTable(name=table, rows=spec.rows, dim=round_up(1), features=(spec.key,)))
        count = ("frozen", f"{spec.key}@{table}" if len(frozen) > 1 else spec.key)
    if strategy == "init-freeze-plus":
        width = round_up(config.tables.plus_dim)
        trained.append(_table(f"{name}_plus", spec.rows, width, spec.key))
        others.append((("tables", spec.key), width))
    for key, values in spec.categorical.items():
        width = round_up(config.towers.feature_dim)
        trained.append(_table(f"{name}_{key}", values, width, key))
        others.append((("tables", key), width))
    given = TowerInput(base=base, dim=dim, count=count, others=others, floats=spec.floats)
    tower = make_tower(config.towers, given, name)
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
