"""Matrices that are read in blocks of rows, and loading them into shards of embedding tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

BLOCK_BYTES = 32 << 20
"""Bytes of one block while a shard is loaded."""
LEAST_SPREAD = 0.1
"""Least standard deviation of log counts. If all ids have nearly the same count, dividing by less would give inputs
that are too large for a network."""
LARGEST = 1e15
"""Largest absolute value of vectors whose squared distances are summed. float32 overflows above it."""


class RowSource(Protocol):
    """A matrix that is read in blocks: a numpy array or memory map, a tensor, or a `factors.FactorTable`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


def round_up(dim: int, multiple: int = 4) -> int:
    """Dimension of an embedding table: fbgemm's kernels need a multiple of 4. The padding is zeros."""
    return -(-dim // multiple) * multiple


def check_source(source: RowSource, table: str, rows: int, dim: int) -> None:
    """Raise ValueError if `source` does not fit a table of shape (rows, dim)."""
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
    """Blocks (first row, float32 values (b, columns)) of a rectangle of `source`, padded with zero columns.

    Raises:
        ValueError: a value is NaN or infinite, or its absolute value exceeds `largest`.
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


def gather_rows(source: RowSource, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (n,), (n, d) float32. Ascending ids are fastest for memory maps."""
    found = source[ids if isinstance(source, torch.Tensor) else ids.numpy()]
    return found.float() if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found, np.float32))


def sample_rows(source: RowSource, limit: int = 1 << 16) -> torch.Tensor:
    """Up to `limit` rows, (n, d) float32, in 64 blocks spread evenly over the matrix. The same on every rank."""
    rows, pieces = source.shape[0], 64
    step, size = max(1, rows // pieces), max(1, limit // pieces)
    parts = []
    for first in range(0, rows, step):
        read = source[first : min(first + min(step, size), rows)]
        parts.append(read.float() if isinstance(read, torch.Tensor) else torch.from_numpy(np.array(read, np.float32)))
    return torch.cat(parts)


class LogCounts:
    """A RowSource of log(1 + count / share), standardized, from counts (n, 1): the input of `TwoTower.load_counts`.

    Args:
        share: share of the examples that were counted, so that counts of a sample compare with those of the log.
        like: take mean and spread from these log counts instead, for example those of all examples.
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


class PendingRows:
    """Rows that a collection loads when it is sharded: table -> source.

    Copies of a model share it. A pickled model does not contain it, because sources may be large or files.
    """

    def __init__(self, sources: Mapping[str, RowSource]) -> None:
        self.sources = dict(sources)

    def __deepcopy__(self, memo: Any) -> PendingRows:
        return self

    def __reduce__(self) -> Any:
        return PendingRows, ({},)


def load_rows(weight: Any, table: str, source: RowSource) -> None:
    """Copy `source` into the weight of a trainable table, as `state_dict` gives it: a tensor or a ShardedTensor.

    Each rank reads only its own rows and columns. If the source has `filled`, (rows,) bool, other rows stay.

    Raises:
        ValueError: shape or values do not fit.
    """
    filled: torch.Tensor | None = getattr(source, "filled", None)
    # ShardedTensor.shape warns that it is deprecated
    size = weight.metadata().size if hasattr(weight, "metadata") else weight.shape
    check_source(source, table, size[0], size[1])
    with torch.no_grad():
        for (rows, columns), local in local_shards(weight):
            for first, block in blocks(source, table, rows, columns):
                part = local[first - rows[0] : first - rows[0] + len(block)]
                if filled is None:
                    part.copy_(block)
                else:
                    use = filled[first : first + len(block)]
                    part[use.to(part.device)] = block[use].to(part)


def local_shards(weight: Any) -> list[tuple[tuple[tuple[int, int], tuple[int, int]], torch.Tensor]]:
    """((row range, column range), tensor) of each shard on this rank."""
    if not hasattr(weight, "local_shards"):
        return [(((0, weight.shape[0]), (0, weight.shape[1])), weight)]
    found = []
    for shard in weight.local_shards():
        (row, column), (height, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        found.append((((row, row + height), (column, column + width)), shard.tensor.detach()))
    return found
