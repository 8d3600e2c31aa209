"""Embedding tables in memory, full or compressed, as the collection of a TorchRec model on one process."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.hashing.id_map import IdMap

SPARSE = 1 << 15
"""From so many rows, a table has sparse gradients. Below, dense ones are faster."""


def embedding(rows: int, dim: int, bound: float) -> nn.Embedding:
    """A table of uniform numbers in [-bound, bound]."""
    made = nn.Embedding(rows, dim, sparse=rows >= SPARSE)
    nn.init.uniform_(made.weight, -bound, bound)
    return made


class IdTable(nn.Module):
    """Maps ids (n,) int64 to vectors (n, dim)."""

    def after_backward(self) -> None:
        """Called between each backward pass and the step of the optimizer."""

    def after_epoch(self) -> None:
        """Called before each further epoch."""


class MappedTable(IdTable):
    """A table with the rows of an id map, or with one row per id.

    Args:
        rows: of the table.
        id_map: None: the row of an id is the id.
        product: multiply the rows of an id, in place of their sum.
        start: (rows, dim) initial values; None: random.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        id_map: IdMap | None = None,
        *,
        product: bool = False,
        start: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        # the product of two numbers should be as large as the number of a full table
        self.rows = embedding(rows, dim, dim ** (-0.25 if product else -0.5))
        if start is not None:
            self.rows.weight.data.copy_(start)
        self.product = product
        self._map = None if id_map is None else id_map.rows.long()
        self._weights = None if id_map is None or id_map.weights is None else id_map.weights.float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._map is None:
            return self.rows(ids)
        found = self.rows(self._map[ids])  # (n, rows per id, dim)
        if self._weights is not None:
            found = found * self._weights[ids].unsqueeze(2)
        if self.product:
            return found.prod(1)
        return found.squeeze(1) if found.shape[1] == 1 else found.sum(1)


class Tables(nn.Module):
    """Takes the place of an EmbeddingBagCollection.

    Args:
        configs: of all tables, with their features.
        tables: by name.
        lists: features with a list of ids per row; the others have one id per row.
    """

    def __init__(
        self, configs: list[EmbeddingBagConfig], tables: Mapping[str, IdTable], lists: Collection[str]
    ) -> None:
        super().__init__()
        self._configs, self._lists = configs, frozenset(lists)
        self.in_order = [tables[config.name] for config in configs]
        self.tables = nn.ModuleList(self.in_order)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        parts = features.to_dict()
        names, values = [], []
        for config, table in zip(self._configs, self.in_order, strict=True):
            for name in config.feature_names:
                vectors = table(parts[name].values())
                if name in self._lists:
                    vectors = _pooled(vectors, parts[name].lengths(), config.pooling)
                names.append(name)
                values.append(vectors)
        return KeyedTensor(names, [value.shape[1] for value in values], torch.cat(values, 1))

    def after_backward(self) -> None:
        for table in self.in_order:
            table.after_backward()

    def after_epoch(self) -> None:
        for table in self.in_order:
            table.after_epoch()


def _pooled(vectors: torch.Tensor, lengths: torch.Tensor, pooling: PoolingType) -> torch.Tensor:
    rows = torch.repeat_interleave(lengths)
    sums = vectors.new_zeros(len(lengths), vectors.shape[1]).index_add(0, rows, vectors)
    return sums / lengths.clamp_min(1)[:, None] if pooling == PoolingType.MEAN else sums
