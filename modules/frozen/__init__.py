"""Frozen embedding tables: an EmbeddingBagCollection that is looked up and never trained."""

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection, FrozenEmbeddingBagCollectionSharder
from recpress.modules.frozen.kernel import FrozenTable

__all__ = ["FrozenEmbeddingBagCollection", "FrozenEmbeddingBagCollectionSharder", "FrozenTable"]
