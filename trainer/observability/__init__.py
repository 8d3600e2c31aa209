"""Observability of a running command: logging, progress, metrics, profiles."""
