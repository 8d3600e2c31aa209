"""Half a sweep: solve all users or all items. Fetch the other side's vectors for a chunk, solve it, sum the loss."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.interactions import CSR
from recpress.modules.als.solvers import Chunk, HeavyRow, Scratch, SharedTerms, SingularRow, loss_of, preconditioner
from recpress.modules.config import ALSParameters
from recpress.modules.id_check import host_reads
from recpress.modules.memory_hook import memory_freed

Solver = Callable[[Chunk, SharedTerms], tuple[torch.Tensor, torch.Tensor]]
"""Rows (B, d) of a chunk, and their predictions (nnz,): `solvers.solve_cg` or `solve_cholesky`."""


class Workers:
    """Threads that each run torch on one core: chunks are small, so one core per chunk is faster than all on each.

    With one torch thread per worker, LAPACK's serial batches use all cores, too. Meanwhile the calling thread also has
    one torch thread: more would spin at their barriers and take cores from the workers. On CUDA, work runs inline.

    `close`, to be called in a `finally`, restores the number of threads of the calling thread. Other threads of the
    host process never change.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.scratch = Scratch()
        self._pool = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count)
            everyone = threading.Barrier(self.count)  # so that each thread gets one of these calls
            for done in [self._pool.submit(_one_torch_thread, everyone) for _ in range(self.count)]:
                done.result()
            torch.set_num_threads(1)
            self._restore_default()

    def _restore_default(self) -> None:
        """Restore torch's default for new threads of the host process.

        torch.set_num_threads sets the number for the calling thread and for all threads that use torch later. A
        temporary thread resets the latter.
        """
        thread = threading.Thread(target=torch.set_num_threads, args=(self.count,))
        thread.start()
        thread.join()

    def map(self, work: Callable[..., Any], calls: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of the calls. At most one call per worker waits."""
        if self._pool is None:
            yield from (work(*call) for call in calls)
            return
        waiting: deque[Future[Any]] = deque()
        for call in calls:
            waiting.append(self._pool.submit(work, *call))
            if len(waiting) > self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """End the threads, and restore the number of torch threads of the calling thread."""
        if self._pool is not None:
            try:
                self._pool.shutdown(cancel_futures=True)
            finally:  # also if an interrupt ends the wait
                torch.set_num_threads(self.count)


def _one_torch_thread(everyone: threading.Barrier) -> None:
    torch.get_num_threads()  # the first call in a thread applies the number of the process; then ours is permanent
    torch.set_num_threads(1)
    everyone.wait()


@dataclass(frozen=True)
class SideSums:
    """Sums over the users or the items of all ranks."""

    gramian: torch.Tensor
    """sum y y', (d, d) float64."""
    popular: torch.Tensor
    """Mean of w y y' over all interactions, (d, d) float64."""
    penalty: float
    """sum reg |y|^2 over this rank's rows only."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the working memory."""

    interactions: int
    """Most interactions of a chunk."""
    rows: int
    """Most rows of a chunk."""
    heavy: int = 1 << 15
    """A row with more interactions is summed in pieces and solved exactly, at every world size. At most
    `interactions`."""
    table: int | None = None
    """Each rank gathers the other side's table for a half-sweep if it has at most this many bytes, as in ALX (Mehta et
    al. 2021). Otherwise each chunk fetches the rows that it needs. None: the bytes of a rank's part of the
    interactions, at least `GATHERED`."""


@dataclass(frozen=True)
class Scales:
    """Factors of the interactions' weights by item (`ALSParameters.item_exponent`)."""

    rows: np.ndarray | None = None
    """To solve items: (local rows,) float32."""
    others: np.ndarray | None = None
    """To solve users: (num_others,) float32, all items on each rank."""

    def of(self, csr: CSR, start: int, stop: int, first: int, last: int) -> np.ndarray:
        """Weights of interactions start..stop-1, in rows first..last-1, without the confidence: float32."""
        weights = np.ones(stop - start, np.float32)
        if csr.values is not None:
            weights *= csr.values[start:stop]
        if self.others is not None:
            weights *= self.others[csr.indices[start:stop]]
        if self.rows is not None:
            lengths = np.diff(np.clip(csr.indptr[first : last + 1], start, stop))
            weights *= np.repeat(self.rows[first:last], lengths)
        return weights


GATHERED = 64 << 20
"""Bytes of a table that each rank may gather, even if its part of the log is smaller."""
_SUMMED = 1024  # rows of a block; float32 sums within it, float64 between blocks
_AT_ONCE = 1 << 24  # numbers of the matrices of blocks that a GPU sums at once
_AHEAD = 64  # chunks that the host prepares before a GPU has solved the one before them
FAR = Limits(interactions=1 << 18, rows=16384)
"""Few large chunks, if rows are fetched from other ranks, or on CUDA."""


def block_rows(dim: int) -> int:
    """Number of rows of `dim` float32 that stay in a core's caches: at most 128 KiB, at most 1024."""
    return min(1024, max(1, (1 << 15) // dim))


class HalfSweep:
    """Solves this rank's users, or its items. The public methods are collective."""

    def __init__(
        self,
        name: str,
        csr: CSR,
        num_rows: int,
        num_others: int,
        config: ALSParameters,
        exchange: Exchange,
        workers: Workers,
        limits: Limits | None = None,
        scales: Scales | None = None,
        used_rows: int | None = None,
        used_others: int | None = None,
    ) -> None:
        self.name, self.csr, self.config, self.exchange, self.workers = name, csr, config, exchange, workers
        self.device = exchange.device
        self.other_blocks = RowBlocks(num_others, exchange.world)
        degree = np.empty(csr.num_rows, np.float32)
        np.subtract(csr.indptr[1:], csr.indptr[:-1], out=degree, casting="unsafe")  # without an int64 copy
        self.degree = torch.from_numpy(degree).to(self.device)
        self.nnz = int(exchange.sum(torch.tensor(len(csr.indices), device=self.device)))
        self.fetches = exchange.world > 1 and not self._gathers(None if limits is None else limits.table)
        near = self.device.type == "cpu" and not self.fetches  # then use cache-sized chunks
        if limits is None:
            limits = Limits(interactions=1 << 15, rows=block_rows(config.factors)) if near else FAR
        self.pieces = list(_pieces(csr.indptr, limits))
        starts = np.arange(0, csr.num_rows, _SUMMED)
        ends = np.minimum(starts + _SUMMED, csr.num_rows)
        self.filled = starts[csr.indptr[ends] > csr.indptr[starts]].tolist()
        """First rows of the blocks of `summary` that have interactions; all rows of the others are zero."""
        self.scales = Scales() if scales is None else scales
        self.weight = None  # sum of the weights of each row's interactions; None: confidence times the degree
        if csr.values is not None or scales is not None:
            sums = torch.from_numpy(_row_sums(csr.indptr, self._weights, self.pieces))
            self.weight = (sums * config.confidence).to(self.device, torch.float32)
        self.base = base = config.unobserved_weight * (used_others or num_others)
        # the line through the regularization at no interactions and at twice the mean number
        far = max(2 * self.nnz / (used_rows or num_rows), 1.0)
        near_reg, far_reg = (config.regularization * (n + base) ** config.frequency_exponent for n in (0.0, far))
        self.reg_line = (near_reg, (far_reg - near_reg) / far)
        # to fetch rows is collective, so all ranks need the same number of rounds
        self.rounds = exchange.max(len(self.pieces)) if self.fetches else len(self.pieces)

    def _weights(self, start: int, stop: int, first: int, last: int) -> np.ndarray:
        return self.scales.of(self.csr, start, stop, first, last)

    def _gathers(self, most: int | None) -> bool:
        """Whether each rank gathers the other side's table to solve. The same on all ranks."""
        if most is None:
            most = max(GATHERED, 8 * self.nnz // self.exchange.world)
        return 4 * self.config.factors * self.other_blocks.num_rows <= most

    def summary(self, rows: torch.Tensor) -> SideSums:
        """Sums over this side's rows (local, d)."""
        if not host_reads(rows):
            both, terms = self._sums_on_device(rows)
            both = self.exchange.sum(both)
            return SideSums(both[0], both[1].div_(max(self.nnz, 1)), float(terms))
        both = rows.new_zeros((2, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        penalty = 0.0
        # float32 within a block, float64 between them
        blocks = ((rows, first, min(first + _SUMMED, len(rows))) for first in self.filled)
        for plain_block, weighted_block, penalty_block in self.workers.map(self._summary_block, blocks):
            both[0] += plain_block
            both[1] += weighted_block
            penalty += penalty_block
        both = self.exchange.sum(both)
        return SideSums(both[0], both[1].div_(max(self.nnz, 1)), penalty)

    def _sums_on_device(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sums of this rank (2, d, d) and the penalty, many blocks in one product. Does not wait."""
        both = rows.new_zeros((2, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        penalty = both.new_zeros(())
        step = _SUMMED * max(1, _AT_ONCE // rows.shape[1] ** 2)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            last = first + len(part)
            weight = (
                self.degree[first:last] * self.config.confidence if self.weight is None else self.weight[first:last]
            )
            plain, weighted = (
                torch.nn.functional.pad(x, (0, 0, 0, -len(part) % _SUMMED)).view(-1, _SUMMED, rows.shape[1])
                for x in (part, part * weight[:, None])
            )
            both[0] += torch.bmm(plain.mT, plain).sum(0, dtype=torch.float64)
            both[1] += torch.bmm(plain.mT, weighted).sum(0, dtype=torch.float64)
            penalty += (part.square().sum(1) * self._reg(first, last)).sum(dtype=torch.float64)
        return both, penalty

    def _summary_block(self, rows: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        part, penalty, at = rows[first:last], 0.0, first
        weighted = rows.new_zeros(rows.shape[1], rows.shape[1])
        for piece in part.split(block_rows(rows.shape[1])):
            end = at + len(piece)
            weight = self.degree[at:end] * self.config.confidence if self.weight is None else self.weight[at:end]
            scaled = torch.mul(piece, weight[:, None], out=self.workers.scratch.floats("left", piece))
            weighted.addmm_(piece.T, scaled)
            penalty += float((torch.square(piece, out=scaled).sum(1) * self._reg(at, end)).sum(dtype=torch.float64))
            at = end
        return part.T @ part, weighted, penalty

    def _reg(self, first: int, last: int) -> torch.Tensor:
        """Regularization of rows first..last-1."""
        reg = self.degree[first:last] + self.base
        return reg.pow_(self.config.frequency_exponent).mul_(self.config.regularization)

    def solve(self, rows: torch.Tensor, others: torch.Tensor, summary: SideSums, solver: Solver) -> float:
        """Solve all `rows` (local, d) in place from the other side's vectors `others` and their `summary`.

        Returns the `loss_of` this rank's interactions.

        Raises:
            ValueError: the other side's vectors are not finite; a row's equations cannot be solved.
        """
        w0 = self.config.unobserved_weight
        if not bool(torch.isfinite(summary.gramian).all()):
            raise ValueError(f"als: the vectors to solve {self.name}s from are not finite; lower confidence")
        memory_freed()  # other threads cannot reuse the memory that a thread freed: call it before each of them works
        gramian = w0 * summary.gramian
        basis, scale = preconditioner(gramian, summary.popular, self.reg_line)
        gramian = gramian.float()
        memory_freed()
        shared = SharedTerms(gramian, w0, basis, scale, self.workers.scratch)
        if not self.fetches:
            others = self.exchange.gather(others, self.other_blocks)
        total: float | torch.Tensor = 0.0
        singular = None
        for loss, row in self.workers.map(self._solve_chunk, self._chunks(rows, others, shared, solver)):
            total = total + loss
            singular = row if singular is None else singular
        # tell all ranks after the last chunk, so that none waits for a rank that failed
        worst = self.exchange.max(-1 if singular is None else singular)
        if worst >= 0:
            raise ValueError(
                f"als: the normal equations of {self.name} {worst} are not positive definite in float32: "
                "expected a larger regularization, or solver = 'cg'"
            )
        return float(total)

    def _chunks(
        self, rows: torch.Tensor, others: torch.Tensor, shared: SharedTerms, solver: Solver
    ) -> Iterator[tuple[Any, ...]]:
        """Arguments of `_solve_chunk`, one per round. Sums rows in pieces."""
        heavy = HeavyRow(shared, self._reg(0, 0))
        for k in range(self.rounds):
            if self.device.type == "cuda" and k and k % _AHEAD == 0:
                torch.cuda.current_stream().synchronize()  # bounds the pinned memory of the chunks
            first, last, start, stop = self.pieces[k] if k < len(self.pieces) else (0, 0, 0, 0)
            chunk = self._chunk(first, last, start, stop, rows, others)
            whole = start == int(self.csr.indptr[first]) and stop == int(self.csr.indptr[last])
            if whole and first < last:
                yield first, rows, chunk, shared, solver
            elif first < last:
                if start == int(self.csr.indptr[first]):
                    heavy = HeavyRow(shared, self._reg(first, last))
                heavy.add(chunk)
                if stop == int(self.csr.indptr[last]):
                    yield first, rows, heavy, shared, solver

    def _solve_chunk(
        self, first: int, rows: torch.Tensor, chunk: Chunk | HeavyRow, shared: SharedTerms, solver: Solver
    ) -> tuple[float | torch.Tensor, int | None]:
        """`loss_of` the chunk, and the global number of a row that cannot be solved, or None."""
        try:
            if isinstance(chunk, HeavyRow):
                rows[first], loss = chunk.solve()
                return loss, None
            solved, scores = solver(chunk, shared)
        except SingularRow as error:
            return 0.0, self.csr.start + first + error.args[0]
        if solved is not chunk.start:
            chunk.start.copy_(solved)
        return loss_of(scores, chunk.weights, shared.unobserved_weight), None

    def _chunk(self, first: int, last: int, start: int, stop: int, rows: torch.Tensor, others: torch.Tensor) -> Chunk:
        """Rows first..last-1 with interactions start..stop-1, and a table that contains the vectors that they need."""
        indptr = np.clip(self.csr.indptr[first : last + 1], start, stop) - start
        indices = self._to_device(self.csr.indices[start:stop])
        weights: torch.Tensor | float = self.config.confidence
        if self.weight is not None:
            weights = self._to_device(self._weights(start, stop, first, last)) * self.config.confidence
        if self.fetches:
            ids, indices = torch.unique(indices, return_inverse=True)
            others, indices = self.exchange.fetch_rows(others, ids, self.other_blocks), indices.to(torch.int32)
        offsets = self._to_device(indptr.astype(np.int32))
        return Chunk(offsets, indices, weights, others, self._reg(first, last), rows[first:last])

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """On CUDA copied from pinned memory, so that the host prepares the next chunks in the meantime."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _row_sums(
    indptr: np.ndarray,
    weights: Callable[[int, int, int, int], np.ndarray],
    pieces: list[tuple[int, int, int, int]],
) -> np.ndarray:
    """Sum of each row's weights, float64. One piece at a time, because numpy casts what it sums."""
    sums = np.zeros(len(indptr) - 1)
    for first, last, start, stop in pieces:
        ends = np.clip(indptr[first : last + 1], start, stop) - start
        filled = np.flatnonzero(np.diff(ends))
        if len(filled):
            sums[first + filled] += np.add.reduceat(weights(start, stop, first, last), ends[filled], dtype=np.float64)
    return sums


def _pieces(indptr: np.ndarray, limits: Limits) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last row, first interaction, last interaction) of chunks within the limits, in order.

    A heavy row is not in a chunk with others, and has as many pieces as it needs. A chunk begins and ends with a row
    that has interactions: rows without any are zero, and if ids have large gaps, most rows have none.
    """
    assert limits.heavy <= limits.interactions
    first, num_rows = 0, len(indptr) - 1
    for heavy in (*np.flatnonzero(np.diff(indptr) > limits.heavy).tolist(), num_rows):
        while first < heavy:
            start = int(indptr[first])
            first = int(np.searchsorted(indptr, start, side="right")) - 1
            if first >= heavy:  # before a heavy row, and at the end
                break
            last = int(np.searchsorted(indptr, start + limits.interactions, side="right")) - 1
            last = min(last, first + limits.rows, heavy)
            stop = int(indptr[last])
            yield first, int(np.searchsorted(indptr, stop)), start, stop
            first = last
        if heavy < num_rows:
            start, stop = int(indptr[heavy]), int(indptr[heavy + 1])
            for at in range(start, stop, limits.interactions):
                yield heavy, heavy + 1, at, min(at + limits.interactions, stop)
            first = heavy + 1
