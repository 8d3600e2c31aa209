"""User and item vectors of a factorization: sharded over ranks, saved as one `.npy` file per shard, memory-mapped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

FactorName = Literal["user", "item", "user_count", "item_count"]
"""Name of a saved table: vectors or counts of users or items."""


@dataclass(frozen=True)
class RowBlocks:
    """Rows 0..num_rows-1 in contiguous blocks of ceil(num_rows / world), as in row-wise sharding."""

    num_rows: int
    world: int = 1

    @property
    def block(self) -> int:
        """Rows of a block. The last blocks may be shorter or empty."""
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
    """This rank's vectors of users and items, sharded by `RowBlocks`. The score of a pair is their dot product.

    users: (rows of this rank's block of users, dim) float32; items: likewise.
    """

    users: torch.Tensor
    items: torch.Tensor
    num_users: int
    num_items: int
    rank: int = 0
    world: int = 1
    user_counts: torch.Tensor | None = None
    """Distinct items of each user of this rank, (rows,) float32, or None if unknown."""
    item_counts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for side, shard, rows in (("user", self.users, self.num_users), ("item", self.items, self.num_items)):
            want = RowBlocks(rows, self.world).size(self.rank)
            if shard.ndim != 2 or shard.shape[0] != want or shard.shape[1] != self.dim:
                raise ValueError(
                    f"{side} factors of rank {self.rank} of {self.world}: expected {want} rows of "
                    f"{self.dim}, got {tuple(shard.shape)}"
                )

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.users.shape[1]

    def save(self, folder: str | Path) -> None:
        """Write this rank's shards `user-00000-of-00002.npy` and `item-...` into an existing folder.

        Counts go to `user_count-...` and `item_count-...`, with one column. The folder is complete when all ranks have
        returned.
        """
        shards = {"user": self.users, "item": self.items}
        for side, counts in (("user", self.user_counts), ("item", self.item_counts)):
            if counts is not None:
                shards[f"{side}_count"] = counts[:, None]
        for side, shard in shards.items():
            path = Path(folder) / shard_name(side, self.rank, self.world)
            part = path.with_name(path.name + ".part")
            with open(part, "wb") as file:
                np.save(file, shard.detach().to("cpu", torch.float32).contiguous().numpy(), allow_pickle=False)
            part.rename(path)


def shard_name(side: str, rank: int, world: int) -> str:
    """File name of one shard."""
    return f"{side}-{rank:05d}-of-{world:05d}.npy"


class FactorTable:
    """A saved table of `Factors`, memory-mapped, independent of the world sizes that write and read it.

    `table[first:last]` and `table[first:last, left:right]` read blocks, `table[ids]` the rows of an integer array.
    Each returns a new float32 array and reads nothing else.
    """

    def __init__(self, folder: str | Path, name: FactorName) -> None:
        """
        Raises:
            ValueError: a shard is missing or corrupt, or is not a matrix with the width of the others.
        """
        self.folder, self.name = Path(folder), name
        self._shards = self._open()
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.shape = (int(self._starts[-1]), int(self._shards[0].shape[1]))

    def __getitem__(self, index: slice | np.ndarray | tuple[slice, slice]) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not isinstance(rows, slice):
            return self._gather(np.asarray(rows))
        first, last, step = rows.indices(self.shape[0])
        assert step == 1, "blocks are contiguous"
        parts = [
            shard[max(first - start, 0) : max(last - start, 0), columns]
            for shard, start in zip(self._shards, self._starts, strict=False)
            if start < last and first < start + len(shard)
        ]
        width = len(range(*columns.indices(self.shape[1])))
        return np.concatenate(parts) if parts else np.empty((0, width), np.float32)

    def _gather(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.shape[0]):
            bad = ids[(ids < 0) | (ids >= self.shape[0])][0]
            raise ValueError(f"{self.folder}: {self.name} id {bad}, expected 0 to {self.shape[0] - 1}")
        out = np.empty((len(ids), self.shape[1]), np.float32)
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        for k, shard in enumerate(self._shards):
            mine = np.flatnonzero(owner == k)
            out[mine] = shard[ids[mine] - self._starts[k]]
        return out

    def _open(self) -> list[np.ndarray]:
        found = {}
        for path in self.folder.glob(f"{self.name}-*-of-*.npy"):
            if match := re.fullmatch(rf"{self.name}-(\d{{5}})-of-(\d{{5}})\.npy", path.name):
                found[int(match[1]), int(match[2])] = path
        worlds = {world for _, world in found}
        if len(worlds) != 1:
            what = f"shards of {sorted(worlds)} ranks" if worlds else f"no {self.name}-*-of-*.npy"
            raise ValueError(f"{self.folder}: {what}, expected the {self.name} factors of one factorization")
        (world,) = worlds
        shards: list[np.ndarray] = []
        for rank in range(world):
            path = self.folder / shard_name(self.name, rank, world)
            if not path.exists():
                raise ValueError(f"{path}: missing, expected {world} shards of {self.name} factors")
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path}: incomplete or corrupt shard of factors ({error})") from error
            if shard.ndim != 2 or shard.dtype != np.float32 or (shards and shard.shape[1] != shards[0].shape[1]):
                width = shards[0].shape[1] if shards else "one width"
                raise ValueError(f"{path}: holds {shard.dtype} {shard.shape}, expected float32 rows of {width}")
            shards.append(shard)
        blocks = RowBlocks(sum(len(shard) for shard in shards), world)
        for rank, shard in enumerate(shards):
            if len(shard) != blocks.size(rank):
                path = self.folder / shard_name(self.name, rank, world)
                raise ValueError(
                    f"{path}: {len(shard)} rows, expected {blocks.size(rank)}: "
                    f"rank {rank}'s share of the {blocks.num_rows} rows of all shards"
                )
        return shards
