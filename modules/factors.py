"""User and item vectors of a factorization: sharded over ranks, saved as one `.npy` file a shard, read by mmap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

Side = Literal["user", "item"]


@dataclass(frozen=True)
class RowBlocks:
    """Rows 0..num_rows-1 in contiguous blocks of ceil(num_rows / world), as TorchRec's row-wise sharding cuts them."""

    num_rows: int
    world: int = 1

    @property
    def block(self) -> int:
        """Rows of every block but the last ones, which may be shorter or empty."""
        return max(1, -(-self.num_rows // self.world))

    def start(self, rank: int) -> int:
        """First row of the rank's block."""
        return min(rank * self.block, self.num_rows)

    def stop(self, rank: int) -> int:
        """One past the last row of the rank's block."""
        return min((rank + 1) * self.block, self.num_rows)

    def size(self, rank: int) -> int:
        """Rows of the rank's block."""
        return self.stop(rank) - self.start(rank)


@dataclass
class Factors:
    """Vectors of the rows that this rank owns; the score of a pair is the dot product of its two vectors.

    users: (rows of this rank's user block, dim) float32, items: likewise. Both by `RowBlocks` over `world` ranks.
    """

    users: torch.Tensor
    items: torch.Tensor
    num_users: int
    num_items: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for side, shard, rows in (("user", self.users, self.num_users), ("item", self.items, self.num_items)):
            want = RowBlocks(rows, self.world).size(self.rank)
            if shard.ndim != 2 or shard.shape[0] != want or shard.shape[1] != self.dim:
                raise ValueError(
                    f"{side} factors of rank {self.rank} of {self.world}: expected {want} rows of {self.dim}, "
                    f"got {tuple(shard.shape)}"
                )

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.users.shape[1]

    @property
    def user_start(self) -> int:
        """Global row of `users[0]`."""
        return RowBlocks(self.num_users, self.world).start(self.rank)

    @property
    def item_start(self) -> int:
        """Global row of `items[0]`."""
        return RowBlocks(self.num_items, self.world).start(self.rank)

    def save(self, folder: str | Path) -> None:
        """Write this rank's two shards, `user-00000-of-00002.npy` and `item-…`, into `folder`, which exists.

        Every rank calls it; the folder is whole when all have returned.
        """
        for side, shard in (("user", self.users), ("item", self.items)):
            path = Path(folder) / shard_name(side, self.rank, self.world)
            part = path.with_name(path.name + ".part")
            with open(part, "wb") as file:
                np.save(
                    file, shard.detach().to("cpu", torch.float32).contiguous().numpy(), allow_pickle=False
                )
            part.rename(path)


def shard_name(side: str, rank: int, world: int) -> str:
    """File name of one shard."""
    return f"{side}-{rank:05d}-of-{world:05d}.npy"
