"""Synthetic logs with planted tastes."""
