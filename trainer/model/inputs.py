"""What a model factory gets: the embedding tables of the features, and the shape of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import PoolingType

from recpress.data.errors import InputError
from recpress.trainer.features.feature_set import FeatureSet


@dataclass(frozen=True)
class ModelInputs:
    """The features of a run."""

    tables: list[EmbeddingBagConfig]
    """One per table, with all its ids: the trainer applies hashes and freezes rows after the factory returns."""
    keys: list[str]
    """Keys of `batch.sparse_features`."""
    floats: list[str]
    """Columns of `batch.dense_features`, (B, len(floats)) float32."""
    dim: int
    """Dimension of tables whose feature does not set one."""

    @classmethod
    def of(cls, features: FeatureSet) -> ModelInputs:
        tables = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_ids,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
                weight_init_min=-(table.dim**-0.5),  # TorchRec's default leaves large tables at zero
                weight_init_max=table.dim**-0.5,
            )
            for table in features.tables
        ]
        return cls(tables, features.keys, features.floats, features.dim)

    def embedding_bags(self, *features: str) -> EmbeddingBagCollection:
        """The tables of these features, by default all, on the device "meta": no rank holds a whole table."""
        return EmbeddingBagCollection(self._of(features), device=torch.device("meta"))

    def sequences(self, *features: str) -> EmbeddingCollection:
        """The tables of these features, by default all, for one vector per id, on the device "meta".

        Features that share a table in it share its rows; rows of another collection are others.

        Raises:
            InputError: a feature has no table; the tables have several dimensions.
        """
        tables = self._of(features)
        if len(dims := {table.embedding_dim for table in tables}) > 1:
            raise InputError(
                f"features {', '.join(features or self.keys)}: their tables have dimensions "
                f"{', '.join(map(str, sorted(dims)))}, expected one in an EmbeddingCollection"
            )
        configs = [
            EmbeddingConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=table.feature_names,
                weight_init_min=table.weight_init_min,
                weight_init_max=table.weight_init_max,
            )
            for table in tables
        ]
        return EmbeddingCollection(configs, device=torch.device("meta"))

    def _of(self, features: Sequence[str]) -> list[EmbeddingBagConfig]:
        """The tables of these features, with these features only."""
        if unknown := [name for name in features if name not in self.keys]:
            raise InputError(f"no feature '{unknown[0]}' with a table; expected one of {', '.join(self.keys)}")
        kept = [(table, [f for f in table.feature_names if not features or f in features]) for table in self.tables]
        return [replace(table, feature_names=names) for table, names in kept if names]
