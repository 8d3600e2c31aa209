"""Negative sampling: items that a user did not interact with, for training and for held-out splits.

May import `dataset` and `sampling`.
"""
