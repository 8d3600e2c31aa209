"""Checkpoints on a disk or an object store: saved in the background, verified before use."""
