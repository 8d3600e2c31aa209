"""The collections that `compress` puts in place of TorchRec's."""

from __future__ import annotations

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.row_source import RowSource, load_rows


class CompressedEmbeddingBagCollection(nn.Module):
    """Replaces an EmbeddingBagCollection: maps ids, looks up trainable and frozen tables, and joins the results."""

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        hashes: LearnedHash | None,
        trainable: EmbeddingBagCollection | None,
        frozen: FrozenEmbeddingBagCollection | None,
        device: torch.device,
    ) -> None:
        """configs: all tables in their original order, with their new numbers of rows."""
        super().__init__()
        self.hashes, self.trainable, self.frozen = hashes, trainable, frozen
        self._configs, self._device = configs, device
        self._frozen_tables = set() if frozen is None else {t.name for t in frozen.tables()}
        self._is_weighted = (trainable is not None and trainable.is_weighted()) or (
            frozen is not None and frozen.weighted
        )
        kept = [c for c in configs if c.name not in self._frozen_tables]
        frozen_features = [f for c in configs if c.name in self._frozen_tables for f in c.feature_names]
        part_names = dict(zip([c.name for c in kept], get_embedding_names_by_table(kept), strict=True))
        # Per output: key, dimension, whether it is frozen, its key in that part, the feature whose length divides it.
        self._outputs: list[tuple[str, int, bool, str, str]] = []
        for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
            is_frozen = config.name in self._frozen_tables
            for index, (name, feature) in enumerate(zip(names, config.feature_names, strict=True)):
                if is_frozen:
                    inner = f"{feature}@{config.name}" if frozen_features.count(feature) > 1 else feature
                else:
                    inner = part_names[config.name][index]
                divide = feature if is_frozen and config.pooling == PoolingType.MEAN else ""
                self._outputs.append((name, config.embedding_dim, is_frozen, inner, divide))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As the forward of the EmbeddingBagCollection."""
        if self.hashes is not None:
            features = self.hashes(features)
        if self.frozen is None:
            assert self.trainable is not None
            return self.trainable(features)
        frozen = self.frozen(features)
        trained = None if self.trainable is None else self.trainable(features)
        return _join(frozen, trained, features, self._outputs)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """All tables in their original order, with their new numbers of rows."""
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return self._device

    def tables(self) -> list[str]:
        return [config.name for config in self._configs]

    def load(self, table: str, source: RowSource) -> None:
        """Load a table, plain or sharded, from its new rows (num_rows, dim)."""
        if table in self._frozen_tables:
            assert self.frozen is not None
            self.frozen.load(table, source)
        else:
            assert self.trainable is not None
            load_rows(self.trainable.state_dict()[f"embedding_bags.{table}.weight"], table, source)


class CompressedEmbeddingCollection(nn.Module):
    """Replaces an EmbeddingCollection: maps ids, then looks them up."""

    def __init__(self, hashes: LearnedHash, trainable: EmbeddingCollection, device: torch.device) -> None:
        super().__init__()
        self.hashes, self.trainable = hashes, trainable
        self._configs, self._device = trainable.embedding_configs(), device

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """As the forward of the EmbeddingCollection."""
        return self.trainable(self.hashes(features))

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return get_embedding_names_by_table(self._configs)

    def need_indices(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._device

    def tables(self) -> list[str]:
        return [config.name for config in self._configs]

    def load(self, table: str, source: RowSource) -> None:
        """Load a table, plain or sharded, from its new rows (num_rows, dim)."""
        load_rows(self.trainable.state_dict()[f"embeddings.{table}.weight"], table, source)


class UnweightedHash(LearnedHash):
    """For unweighted collections behind a weighted map: ignores the weights of the batch, and uses those of the map."""

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if features.weights_or_none() is not None:
            variable = features.variable_stride_per_key()
            features = KeyedJaggedTensor(
                keys=features.keys(),
                values=features.values(),
                lengths=features.lengths_or_none(),
                offsets=features.offsets_or_none(),
                stride=None if variable else features.stride(),
                stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
                length_per_key=features.length_per_key_or_none(),
                inverse_indices=features.inverse_indices_or_none(),
            )
        return super().forward(features)


@torch.fx.wrap
def _join(
    frozen: KeyedTensor,
    trained: KeyedTensor | None,
    features: KeyedJaggedTensor,
    outputs: list[tuple[str, int, bool, str, str]],
) -> KeyedTensor:
    """Columns of both parts in the order of `outputs`. A leaf of torch.fx, so that pipelines can trace the model.

    Raises:
        ValueError: the keys of the batch have different strides, which frozen tables do not support.
    """
    if features.variable_stride_per_key():
        raise ValueError("compress: frozen tables do not support a batch with a different stride for each key")
    values = []
    for _, dim, is_frozen, name, divide in outputs:
        part = frozen if is_frozen else trained
        assert part is not None
        value = part[name]
        value = value if value.shape[1] == dim else value[:, :dim]  # the dimension of a frozen table is padded
        if divide:
            value = value / features[divide].lengths().clamp_min(1)[:, None]
        values.append(value)
    return KeyedTensor([o[0] for o in outputs], [o[1] for o in outputs], torch.cat(values, 1))
