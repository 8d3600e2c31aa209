"""Shared rows from the vectors of ids, and the vectors of ids from shared rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.row_source import BLOCK_BYTES, RowSource, blocks, check_source, gather_rows


def shared_rows(
    id_map: IdMap,
    vectors: RowSource,
    counts: RowSource | None = None,
    table: str = "",
    exchange: Exchange | None = None,
) -> torch.Tensor:
    """Rows (num_rows, d) float32 that minimize the squared error of the ids' vectors, weighted by counts.

    With one row per id, a row is the weighted mean of its ids. `vectors` are read in blocks, so memory is that of the
    rows. With two, `map_matrix.MapMatrix.fit` solves some columns at a time, in about six times their memory. A row
    without ids is zero.

    Args:
        vectors: (num_ids, d).
        counts: (num_ids, 1), >= 0; counts below 0.1 weigh 0.1. None: all ids weigh the same.
        table: name in error messages.
        exchange: splits the work. All its ranks call this with the same arguments, each reads its part of the ids, and
            all get all rows. They equal the rows at world size 1, with one row per id up to rounding. None: world size
            1.

    Raises:
        ValueError: lengths do not fit the map; a vector or a count is not finite. On every rank.
    """
    (ids, dim), num_rows = vectors.shape, id_map.num_rows
    for what, source in (("vectors", vectors), ("counts", counts)):
        if source is not None and source.shape[0] != id_map.num_ids:
            raise ValueError(f"table {table!r}: {what} of {source.shape[0]} ids, but its map has {id_map.num_ids}")
    if exchange is None:
        exchange = Exchange(None, torch.device("cpu"))
        exchange.rank, exchange.world = 0, 1
    share = RowBlocks(ids, exchange.world)
    mine = (share.start(exchange.rank), share.stop(exchange.rank))
    if id_map.rows_per_id > 1:
        return _solved(id_map, vectors, counts, table, exchange, share, mine)

    def sums() -> tuple[torch.Tensor, torch.Tensor]:
        rows, mass = torch.zeros(num_rows, dim), torch.zeros(num_rows, 1)
        for first, block in blocks(vectors, table, mine, (0, dim)):
            of_ids = torch.ones(len(block)) if counts is None else _weights(counts, table, first, first + len(block))
            add_members(rows, mass, id_map, first, block, of_ids[:, None])
        return rows, mass

    rows, mass = exchange.together(sums)
    exchange.add_up(rows, BLOCK_BYTES // (4 * dim))
    exchange.add_up(mass, BLOCK_BYTES // 4)
    return rows / mass.clamp_min(torch.finfo(torch.float32).tiny)


def _solved(
    id_map: IdMap,
    vectors: RowSource,
    counts: RowSource | None,
    table: str,
    exchange: Exchange,
    share: RowBlocks,
    mine: tuple[int, int],
) -> torch.Tensor:
    """`shared_rows` with several rows per id. Columns of a least-squares problem are independent: in each round, a rank
    receives `_COLUMNS` columns of all ids from the ranks that read them, and solves these columns."""
    dim, world = vectors.shape[1], exchange.world

    def weights_here() -> torch.Tensor:
        if counts is None:
            return torch.ones(mine[1] - mine[0])
        starts = range(*mine, _COUNTS)
        return torch.cat(
            [torch.empty(0), *(_weights(counts, table, first, min(first + _COUNTS, mine[1])) for first in starts)]
        )

    weights = exchange.gather(exchange.together(weights_here)[:, None].to(exchange.device), share)[:, 0].cpu()
    rows, shared = torch.empty(id_map.num_rows, dim), MapMatrix(id_map)
    for start in range(0, dim, _COLUMNS * world):
        parts = [
            (min(start + rank * _COLUMNS, dim), min(start + (rank + 1) * _COLUMNS, dim)) for rank in range(world)
        ]  # per rank; empty if there are fewer columns than ranks
        whole = (start, parts[-1][1])

        def columns(whole: tuple[int, int] = whole) -> torch.Tensor:
            none = torch.empty(0, whole[1] - whole[0])
            return torch.cat([none, *(block for _, block in blocks(vectors, table, mine, whole))])

        read = exchange.together(columns)
        sent = [read[:, first - start : last - start].reshape(-1).numpy() for first, last in parts]
        del read
        kept = torch.from_numpy(exchange.all_to_all(sent))
        del sent
        first, last = parts[exchange.rank]
        found = torch.empty(id_map.num_rows, 0)
        if last > first:
            found = shared.fit(kept.reshape(id_map.num_ids, last - first), weights)
        for rank, (begin, end) in enumerate(parts):
            if end > begin:
                own = found if rank == exchange.rank else torch.empty(id_map.num_rows, end - begin)
                rows[:, begin:end] = exchange.broadcast(own, rank)
    return rows


_COLUMNS = 16
"""Columns to solve together for two rows per id. Memory is about six times theirs instead of six times the table's."""
_COUNTS = 1 << 20


def _weights(counts: RowSource, table: str, first: int, stop: int) -> torch.Tensor:
    """Weights of ids first..stop-1, (stop - first,)."""
    read = counts[first:stop]
    read = read.float() if isinstance(read, torch.Tensor) else torch.from_numpy(np.array(read, np.float32))
    if not bool(torch.isfinite(read).all()):
        raise ValueError(f"table {table!r}: a count of ids {first} to {stop - 1} is NaN or infinite")
    return read.clamp_min(0.1)[:, 0]


def warm_rows(
    source: RowSource,
    id_map: IdMap,
    counts: torch.Tensor | None = None,
    *,
    table: str = "",
    mean_pooled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows (num_rows, dim) float32, which of them have ids (num_rows,) bool) for a warm start from one row per id.

    Training improves these rows, so they need no least squares as in `shared_rows`, and a table of any size is read in
    blocks. A row is the mean, weighted by counts, of a target from each of its ids (the plain mean if all counts are
    0). The target of an id with one row is its vector x. With several rows of weights w_k it is w_k x / sum(w^2), the
    smallest vectors whose weighted sum is x: x / 2 for two unweighted rows. With mean pooling, which divides by the
    number of rows, it is x.

    Raises:
        ValueError: counts do not fit or are negative; a value of `source` is not finite.
    """
    num_ids = id_map.num_ids
    counts, total, members = _masses(source, id_map, counts, table)
    found = torch.zeros(id_map.num_rows, source.shape[1])
    for first, block in blocks(source, table, (0, num_ids), (0, source.shape[1])):
        part = slice(first, first + len(block))
        share = _shares(id_map, part, mean_pooled)
        for column in range(id_map.rows_per_id):
            rows = id_map.rows[part, column].long()
            of_row = torch.where(total[rows] > 0, counts[part] / total[rows], 1 / members[rows]).float()
            found.index_add_(0, rows, block * (of_row * share[:, column])[:, None])
    return found, members > 0


def _masses(
    source: RowSource, id_map: IdMap, counts: torch.Tensor | None, table: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts (num_ids,), and per row the sum of the counts of its ids and their number. All float64."""
    num_ids = id_map.num_ids
    check_source(source, table, num_ids, source.shape[-1])
    if counts is None:
        counts = torch.ones(num_ids)
    if counts.shape != (num_ids,):
        raise ValueError(f"table {table!r}: counts have shape {tuple(counts.shape)}, expected ({num_ids},)")
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise ValueError(f"table {table!r}: counts hold a negative number, NaN or infinity")
    counts = counts.detach().double().cpu()
    total = torch.zeros(id_map.num_rows, dtype=torch.float64)
    members = torch.zeros(id_map.num_rows, dtype=torch.float64)
    for column in range(id_map.rows_per_id):
        total.index_add_(0, id_map.rows[:, column].long(), counts)
        members.index_add_(0, id_map.rows[:, column].long(), torch.ones(num_ids, dtype=torch.float64))
    return counts, total, members


def _shares(id_map: IdMap, ids: slice | torch.Tensor, mean_pooled: bool) -> torch.Tensor:
    """Factors (n, rows_per_id) of the vectors of n ids in the targets of their rows."""
    entries = id_map.rows[ids]
    if mean_pooled:
        return torch.ones(entries.shape)
    weights = torch.ones(entries.shape) if id_map.weights is None else id_map.weights[ids].float()
    return weights / (weights**2).sum(1, keepdim=True).clamp_min(1e-12)


class WarmRows:
    """The rows of `warm_rows`, computed on access, so that a rank reads the vectors of its shard only.

    Memory: 8 bytes per entry of the map, and one block of vectors.
    """

    def __init__(
        self,
        source: RowSource,
        id_map: IdMap,
        counts: torch.Tensor | None = None,
        *,
        table: str = "",
        mean_pooled: bool = False,
    ) -> None:
        """As `warm_rows`."""
        self._source, self._map, self._table, self._mean_pooled = source, id_map, table, mean_pooled
        self._counts, self._total, self._members = _masses(source, id_map, counts, table)
        self.shape = (id_map.num_rows, source.shape[1])
        self.filled = self._members > 0
        """Which rows have ids, (num_rows,) bool."""
        self._order: torch.Tensor | None = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        first, last, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        flat, each = self._map.rows.reshape(-1), self._map.rows_per_id
        if self._order is None:
            self._order = torch.argsort(flat, stable=True)
            self._starts = torch.cat([torch.zeros(1), self._members.cumsum(0)]).long()
        entries = self._order[int(self._starts[first]) : int(self._starts[max(first, last)])].sort().values
        found = torch.zeros(max(0, last - first), max(0, right - left))
        for part in entries.split(max(1, BLOCK_BYTES // (4 * self.shape[1]))):
            ids, row = part // each, flat[part].long()
            share = _shares(self._map, ids, self._mean_pooled)[torch.arange(len(ids)), part % each]
            total = self._total[row]
            factor = torch.where(total > 0, self._counts[ids] / total, 1 / self._members[row]).float() * share
            found.index_add_(0, row - first, gather_rows(self._source, ids)[:, left:right] * factor[:, None])
        return found


def add_members(
    sums: torch.Tensor, mass: torch.Tensor, id_map: IdMap, first: int, block: torch.Tensor, weights: torch.Tensor
) -> None:
    """Add ids from `first` on, with one row each, to the sums of their rows. In the end the rows are sums / mass.

    Args:
        sums, mass: (num_rows, d) and (num_rows, 1), changed in place.
        block, weights: vectors (b, d) and weights (b, 1) of the ids.
    """
    at = id_map.rows[first : first + len(block), 0].long()
    part = 1.0 if id_map.weights is None else id_map.weights[first : first + len(block)].float()
    sums.index_add_(0, at, block * (weights * part))
    mass.index_add_(0, at, weights * part**2)


class IdVectors:
    """A RowSource (num_ids, d) of the vectors of ids, computed from shared rows on access."""

    def __init__(self, id_map: IdMap, rows: RowSource) -> None:
        self._map, self._rows = id_map, rows
        self.shape = (id_map.num_ids, rows.shape[1])

    def __getitem__(self, index: slice) -> torch.Tensor:
        at = self._map.rows[index].long()
        read: Any = self._rows[at if isinstance(self._rows, torch.Tensor) else at.numpy()]
        each = torch.as_tensor(read).float()
        if self._map.weights is not None:
            each = each * self._map.weights[index].float().unsqueeze(-1)
        return each.sum(1)
