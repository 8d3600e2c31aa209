"""Logs of interactions: datasets, sampling, the training stream, negatives, ingest, synthetic data."""
