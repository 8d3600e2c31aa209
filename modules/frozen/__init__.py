"""Frozen embedding tables: an EmbeddingBagCollection that is looked up and never trained."""
