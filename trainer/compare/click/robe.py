"""Random offset block embedding arrays (Desai, Chou and Shrivastava, MLSys 2022): one array for all tables."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from recpress.trainer.compare.click.tables import IdTable

PRIME = 2038074743


class RobeArray(nn.Module):
    """`size` numbers. A vector is a row of blocks of `block` consecutive numbers, cyclic, from hashed positions.

    Block j of key x starts at ((A x + B j + C) mod PRIME) mod size, with A, B and C drawn from the seed.

    Raises:
        ValueError: `block` does not divide the dimension; the array is smaller than a block.
    """

    def __init__(self, size: int, dim: int, block: int, seed: int) -> None:
        super().__init__()
        if dim % block or size < block:
            raise ValueError(f"blocks of {block} in an array of {size} numbers for vectors of {dim}")
        self.size, self.block, self.dim = size, block, dim
        self.numbers = nn.Parameter(torch.empty(size).uniform_(-(dim**-0.5), dim**-0.5))
        self.a, self.b, self.c = np.random.default_rng(seed).integers(1, PRIME, 3).tolist()

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """(n,) int64 -> (n, dim)."""
        blocks = torch.arange(self.dim // self.block)
        start = (keys[:, None] * self.a % PRIME + blocks * self.b + self.c) % PRIME % self.size
        positions = (start[:, :, None] + torch.arange(self.block)).flatten()
        positions = torch.where(positions < self.size, positions, positions - self.size)
        return self.numbers.index_select(0, positions).view(len(keys), self.dim)


class RobeTable(IdTable):
    """One table of a RobeArray: the key of an id is `first` plus the id."""

    def __init__(self, array: RobeArray, first: int) -> None:
        super().__init__()
        self.array, self.first = array, first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.array(ids + self.first)
