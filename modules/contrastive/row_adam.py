"""Adam on the rows of a shard: momentum per element, one second moment per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BETA1, BETA2 = 0.9, 0.99
_TINY = 1e-12


class RowAdam:
    """A table of vectors that are read on the unit sphere, and its optimizer. Rows that a step does not read rest.

    A step needs no bias correction: after the first one of a row, momentum and root of the second moment are both a
    tenth of the gradient's.

    Args:
        rows: (n, d) float32; changed in place.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.momentum = torch.zeros_like(rows)
        self.second = torch.zeros(len(rows), 1, device=rows.device)

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors (k, d) of ids, in new memory."""
        return self.rows.index_select(0, ids)

    def units(self) -> torch.Tensor:
        """All unit vectors, (n, d)."""
        return F.normalize(self.rows)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit vectors (k, d), 1 / lengths (k, 1)) of distinct ids."""
        vectors = self.vectors(ids)
        inverse = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=_TINY).reciprocal_()
        return vectors.mul_(inverse), inverse

    def step(
        self, ids: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor, gradient: torch.Tensor, rate: float
    ) -> None:
        """Move distinct ids along the gradient by their unit vectors (k, d), which is overwritten."""
        # x / |x| has the gradient (g - (g.u) u) / |x|
        along = (gradient * unit).sum(1, keepdim=True)
        self.move(ids, gradient.addcmul_(along, unit, value=-1).mul_(inverse), rate)

    def move(self, ids: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        """Move distinct ids along the gradient by their vectors, (k, d)."""
        second = self.second.index_select(0, ids)
        squares = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square_()
        second.mul_(BETA2).add_(squares, alpha=(1 - BETA2) / gradient.shape[1])
        self.second.index_copy_(0, ids, second)
        momentum = self.momentum.index_select(0, ids).lerp_(gradient, 1 - BETA1)
        self.momentum.index_copy_(0, ids, momentum)
        length = second.sqrt_().add_(_TINY).reciprocal_().mul_(-rate)
        self.rows.index_add_(0, ids, momentum.mul_(length))
