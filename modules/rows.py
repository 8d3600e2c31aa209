"""Reading a table of factors straight into the shards of embedding tables, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

BLOCK_BYTES = 32 << 20
"""Memory of one block while a shard is filled."""


LEAST_SPREAD = 0.1
"""Of log counts. Where all ids have the same count, those of a part of the rows still differ: divided by next to
nothing, they would be numbers that a network cannot take."""
LARGEST = 1e15
"""Largest absolute value of vectors whose squared distances are summed: above, float32 overflows."""


class RowSource(Protocol):
    """A matrix that is read in blocks: a numpy array or memory map, a tensor, `factors.FactorTable`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


def round_up(dim: int, multiple: int = 4) -> int:
    """The embedding dimension that a table gets: fbgemm's kernels want a multiple of 4; the rest is zeros."""
    return -(-dim // multiple) * multiple


def check_source(source: RowSource, table: str, rows: int, dim: int) -> None:
    """Raise ValueError where `source` does not fit a table of shape (rows, dim)."""
    if len(source.shape) != 2:
        raise ValueError(f"table {table!r}: source has shape {tuple(source.shape)}, expected ({rows}, {dim})")
    if source.shape[0] != rows:
        raise ValueError(f"table {table!r}: source has {source.shape[0]} rows, expected {rows}")
    if source.shape[1] != dim and round_up(source.shape[1]) != dim:
        raise ValueError(f"table {table!r}: source has dimension {source.shape[1]}, expected {dim}")


def blocks(
    source: RowSource,
    table: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    *,
    largest: float = math.inf,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks (first row, float32 values (b, columns)) of a rectangle of `source`, 0 past its last column.

    Raises:
        ValueError: a value is NaN or infinite, or above `largest` without its sign.
    """
    width = columns[1] - columns[0]
    stop = min(columns[1], source.shape[1])
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for first in range(rows[0], rows[1], step):
        last = min(first + step, rows[1])
        block = torch.zeros(last - first, width)
        if stop > columns[0]:
            read = source[first:last, columns[0] : stop]
            read = read if isinstance(read, torch.Tensor) else torch.from_numpy(np.array(read, np.float32))
            block[:, : stop - columns[0]] = read.detach()
        if not bool(torch.isfinite(block).all()):
            row = first + int((~torch.isfinite(block)).any(1).nonzero()[0])
            raise ValueError(f"table {table!r}: row {row} of the source holds NaN or infinity")
        if largest < math.inf and block.numel() and float(block.abs().max()) > largest:
            row = first + int((block.abs() > largest).any(1).nonzero()[0])
            raise ValueError(
                f"table {table!r}: row {row} of the source holds {float(block[row - first].abs().max()):.3g}, expected "
                f"at most {largest:g}: squared distances overflow; divide the vectors by a constant"
            )
        yield first, block


def sample_rows(source: RowSource, limit: int = 1 << 16) -> torch.Tensor:
    """Up to `limit` rows, in 64 blocks spread evenly over the matrix, float32: the same on every rank."""
    rows, pieces = source.shape[0], 64
    step, size = max(1, rows // pieces), max(1, limit // pieces)
    parts = []
    for first in range(0, rows, step):
        read = source[first : min(first + min(step, size), rows)]
        parts.append(read.float() if isinstance(read, torch.Tensor) else torch.from_numpy(np.array(read, np.float32)))
    return torch.cat(parts)


class LogCounts:
    """log(1 + count / share) of a table of counts (n, 1), standardised: a RowSource for
    `TwoTower.load_counts`.

    Args:
        share: part of the rows that were counted, so that counts of a part compare with those of all.
        like: standardise by the mean and spread of these, those of all rows.
    """

    def __init__(self, counts: RowSource, *, share: float = 1.0, like: LogCounts | None = None) -> None:
        self._counts, self._share = counts, share
        self.shape = (counts.shape[0], 1)
        self.mean: float
        self.spread: float
        if like is not None:
            self.mean, self.spread = like.mean, like.spread
        else:
            logs = torch.log1p(sample_rows(counts) / share)
            self.mean = float(logs.mean())
            self.spread = float(logs.std(correction=0).clamp_min(LEAST_SPREAD))

    def __getitem__(self, index: Any) -> torch.Tensor:
        counts = torch.as_tensor(np.array(self._counts[index], np.float32))
        return (torch.log1p(counts / self._share) - self.mean) / self.spread


def load_trainable(collection: nn.Module, table: str, source: RowSource) -> None:
    """Copy `source` into a trainable table of an EmbeddingBagCollection, plain or sharded.

    Each rank reads its own rows and columns alone.

    Raises:
        ValueError: shape or values do not fit.
    """
    weight = collection.state_dict()[f"embedding_bags.{table}.weight"]
    # ShardedTensor's own `shape` warns of its deprecation
    size = weight.metadata().size if hasattr(weight, "metadata") else weight.shape
    check_source(source, table, size[0], size[1])
    for (rows, columns), local in local_shards(weight):
        for first, block in blocks(source, table, rows, columns):
            start = first - rows[0]
            local[start : start + block.shape[0]].copy_(block)


def local_shards(weight: Any) -> list[tuple[tuple[tuple[int, int], tuple[int, int]], torch.Tensor]]:
    """((row range, column range), tensor) of each shard that this rank holds."""
    if not hasattr(weight, "local_shards"):
        return [(((0, weight.shape[0]), (0, weight.shape[1])), weight)]
    found = []
    for shard in weight.local_shards():
        (row, column), (height, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        found.append((((row, row + height), (column, column + width)), shard.tensor.detach()))
    return found
