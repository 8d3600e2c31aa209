"""What a model factory gets: the embedding tables of the features, and the shape of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import PoolingType

from recpress.trainer.features.resolve import FeatureSet


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

    def embedding_bags(self) -> EmbeddingBagCollection:
        """All tables, on the device "meta": no rank holds a whole table."""
        return EmbeddingBagCollection(self.tables, device=torch.device("meta"))
