"""Negative samples for training and evaluation, and the set of interactions that they must avoid."""
