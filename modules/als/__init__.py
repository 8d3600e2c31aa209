"""Alternating least squares: factorization, automatic settings, fold-in, collapse checks."""

from recpress.modules.als.factorization import ALS

__all__ = ["ALS"]
