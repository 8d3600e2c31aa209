"""Compress the tables of an existing TorchRec model: frozen rows and id maps."""
