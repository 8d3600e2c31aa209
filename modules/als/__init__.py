"""Alternating least squares: factorization, automatic settings, fold-in, collapse checks."""
