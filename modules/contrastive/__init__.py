"""Contrastive factorization: sampled losses of cosines, trained by row-wise Adam."""
