"""Contrastive factorization: sampled losses of cosines, row-wise Adam, automatic settings, fold-in."""

from recpress.modules.contrastive.factorization import Contrastive

__all__ = ["Contrastive"]
