"""One side's half of a sweep: fetch the other side's rows for a chunk, solve it, count the loss."""

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
from recpress.modules.als.solvers import Chunk, HeavyRow, Scratch, Shared, SingularRow, loss_of, preconditioner
from recpress.modules.config import ALSParameters
from recpress.modules.memory_hook import memory_freed

Solver = Callable[[Chunk, Shared], tuple[torch.Tensor, torch.Tensor]]
"""Rows (B, d) of a chunk, and their predictions (nnz,): `als_solvers.solve_cg` or `solve_cholesky`."""


class Workers:
    """Threads that each run torch on one core: chunks are small, and a core a chunk beats all cores on each.

    One torch thread a worker also keeps LAPACK's serial batches busy on all cores. While they work, the
    calling thread uses one too: more would spin at their barriers and take the cores from the workers. On
    CUDA work runs inline.

    The host process keeps its settings: the calling thread has its number of threads again after `close`, which
    belongs into a `finally`, and other threads of the host are never changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.scratch = Scratch()
        self._pool = None
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count)
            everyone = threading.Barrier(self.count)  # so that no thread takes two of these calls
            for done in [self._pool.submit(_one_torch_thread, everyone) for _ in range(self.count)]:
                done.result()
            torch.set_num_threads(1)
            self._restore_default()

    def _restore_default(self) -> None:
        """torch.set_num_threads sets the number of the calling thread, and of all threads that torch meets later: a
        thread of no other use sets the latter back, so that new threads of the host get what they would have got."""
        thread = threading.Thread(target=torch.set_num_threads, args=(self.count,))
        thread.start()
        thread.join()

    def map(self, work: Callable[..., Any], calls: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of the calls; at most two calls a worker are held at a time."""
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
        """End the threads; the calling thread uses as many torch threads as before."""
        if self._pool is not None:
            try:
                self._pool.shutdown(cancel_futures=True)
            finally:  # an interrupt ends the wait
                torch.set_num_threads(self.count)


def _one_torch_thread(everyone: threading.Barrier) -> None:
    torch.get_num_threads()  # torch's first call in a thread takes the process's number; the next one stays
    torch.set_num_threads(1)
    everyone.wait()


@dataclass(frozen=True)
class Summary:
    """Sums over one side's rows of all ranks: gramian = sum y y' and popular = mean of w y y' over all
    interactions, (d, d) float64; penalty = sum reg |y|^2 over this rank's rows only.
    """

    gramian: torch.Tensor
    popular: torch.Tensor
    penalty: float


@dataclass(frozen=True)
class Limits:
    """What bounds the working memory: the size of a chunk, which rows are too heavy for one, and what a rank holds of
    other ranks' rows.

    interactions, rows: most of a chunk. heavy, at most `interactions`: a row of more is summed in pieces and
    solved exactly; the same on every world size, so that all solve alike.
    table: bytes of the other side's table up to which each rank gathers all of it for a half-sweep, as ALX does
    (Mehta et al. 2021); a larger one is fetched in parts, by each chunk what it touches. None: as many as a rank's part
    of the interactions takes, at least `GATHERED`.
    """

    interactions: int
    rows: int
    heavy: int = 1 << 15
    table: int | None = None


@dataclass(frozen=True)
class Scales:
    """Factors of the interactions' weights by item (`ALSParameters.item_exponent`).

    rows: (local rows,) float32 where this side is the items'; others: (num_others,) float32, all of them on each rank,
    where the other side is.
    """

    rows: np.ndarray | None = None
    others: np.ndarray | None = None

    def of(self, csr: CSR, start: int, stop: int, first: int, last: int) -> np.ndarray:
        """Weights of interactions start..stop-1, which lie in rows first..last-1, without the confidence: float32."""
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
"""Bytes of a table that each rank may gather however small its part of the log is."""
FAR = Limits(interactions=1 << 18, rows=16384)
"""Where rows are fetched from other ranks, or work runs on CUDA: few large chunks."""


def block_rows(dim: int) -> int:
    """Rows of `dim` float32 that take at most 128 KiB, 1024 at most: they stay in a core's caches."""
    return min(1024, max(1, (1 << 15) // dim))


class Side:
    """One side's rows of this rank, with what their half-sweeps need. Its public methods are collective."""

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
        near = self.device.type == "cpu" and not self.fetches  # in cache-sized chunks
        if limits is None:
            limits = Limits(interactions=1 << 15, rows=block_rows(config.factors)) if near else FAR
        self.pieces = list(_pieces(csr.indptr, limits))
        self.scales = Scales() if scales is None else scales
        self.weight = None  # sum of the weights of each row's interactions; None: confidence times the degree
        if csr.values is not None or scales is not None:
            sums = torch.from_numpy(_row_sums(csr.indptr, self._weights, self.pieces))
            self.weight = (sums * config.confidence).to(self.device, torch.float32)
        self.base = base = config.unobserved_weight * (used_others or num_others)
        # the line through the regularization of no interactions and of twice the mean number
        far = max(2 * self.nnz / (used_rows or num_rows), 1.0)
        near_reg, far_reg = (config.regularization * (n + base) ** config.frequency_exponent for n in (0.0, far))
        self.reg_line = (near_reg, (far_reg - near_reg) / far)
        # where rows are fetched from all ranks, in as many rounds on each
        self.rounds = exchange.max(len(self.pieces)) if self.fetches else len(self.pieces)

    def _weights(self, start: int, stop: int, first: int, last: int) -> np.ndarray:
        return self.scales.of(self.csr, start, stop, first, last)

    def _gathers(self, most: int | None) -> bool:
        """Whether each rank holds the other side's whole table while it solves; the same on all ranks."""
        if most is None:
            most = max(GATHERED, 8 * self.nnz // self.exchange.world)
        return 4 * self.config.factors * self.other_blocks.num_rows <= most

    def summary(self, rows: torch.Tensor) -> Summary:
        """Of this side's rows (local, d)."""
        both = rows.new_zeros((2, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        penalty = 0.0
        # float32 within a block, float64 between them
        blocks = ((rows, first, min(first + 1024, len(rows))) for first in range(0, len(rows), 1024))
        for plain_block, weighted_block, penalty_block in self.workers.map(self._summary_block, blocks):
            both[0] += plain_block
            both[1] += weighted_block
            penalty += penalty_block
        both = self.exchange.sum(both)
        return Summary(both[0], both[1].div_(max(self.nnz, 1)), penalty)

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
        """reg of rows first..last-1."""
        reg = self.degree[first:last] + self.base
        return reg.pow_(self.config.frequency_exponent).mul_(self.config.regularization)

    def solve(self, rows: torch.Tensor, others: torch.Tensor, summary: Summary, solver: Solver) -> float:
        """Solve all `rows` (local, d) in place, from `others`, the other side's, and their `summary`.

        Returns `loss_of` this rank's interactions.
        """
        w0 = self.config.unobserved_weight
        if not bool(torch.isfinite(summary.gramian).all()):
            raise ValueError(f"als: the vectors that {self.name}s are solved from are not finite; lower confidence")
        memory_freed()  # what a thread has freed the others cannot use: before this one works, and before they do
        gramian = w0 * summary.gramian
        basis, scale = preconditioner(gramian, summary.popular, self.reg_line)
        gramian = gramian.float()
        memory_freed()
        shared = Shared(gramian, w0, basis, scale, self.workers.scratch)
        if not self.fetches:
            others = self.exchange.gather(others, self.other_blocks)
        total, singular = 0.0, None
        for loss, row in self.workers.map(self._solve_chunk, self._chunks(rows, others, shared, solver)):
            total += loss
            singular = row if singular is None else singular
        # told to all ranks once all chunks are through, so that none waits for one that gave up
        worst = self.exchange.max(-1 if singular is None else singular)
        if worst >= 0:
            raise ValueError(
                f"als: the normal equations of {self.name} {worst} are not positive definite in float32: "
                "expected a larger regularization, or solver = 'cg'"
            )
        return total

    def _chunks(
        self, rows: torch.Tensor, others: torch.Tensor, shared: Shared, solver: Solver
    ) -> Iterator[tuple[Any, ...]]:
        """Arguments of `_solve_chunk`, one a round; rows in pieces are summed here."""
        heavy = HeavyRow(shared, 0.0)
        for k in range(self.rounds):
            first, last, start, stop = self.pieces[k] if k < len(self.pieces) else (0, 0, 0, 0)
            chunk = self._chunk(first, last, start, stop, rows, others)
            whole = start == int(self.csr.indptr[first]) and stop == int(self.csr.indptr[last])
            if whole and first < last:
                yield first, rows, chunk, shared, solver
            elif first < last:
                if start == int(self.csr.indptr[first]):
                    heavy = HeavyRow(shared, float(self._reg(first, last)))
                heavy.add(chunk)
                if stop == int(self.csr.indptr[last]):
                    yield first, rows, heavy, shared, solver

    def _solve_chunk(
        self, first: int, rows: torch.Tensor, chunk: Chunk | HeavyRow, shared: Shared, solver: Solver
    ) -> tuple[float, int | None]:
        """Loss of the chunk, and the global row that could not be solved, if any."""
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
        """Rows first..last-1 with interactions start..stop-1, and others with those that they touch among them."""
        indptr = np.clip(self.csr.indptr[first : last + 1], start, stop) - start
        indices = torch.from_numpy(self.csr.indices[start:stop]).to(self.device)
        weights: torch.Tensor | float = self.config.confidence
        if self.weight is not None:
            weights = torch.from_numpy(self._weights(start, stop, first, last)).to(self.device) * self.config.confidence
        if self.fetches:
            ids, indices = torch.unique(indices, return_inverse=True)
            others, indices = self.exchange.rows(others, ids, self.other_blocks), indices.to(torch.int32)
        offsets = torch.from_numpy(indptr.astype(np.int32)).to(self.device)
        return Chunk(offsets, indices, weights, others, self._reg(first, last), rows[first:last])


def _row_sums(
    indptr: np.ndarray,
    weights: Callable[[int, int, int, int], np.ndarray],
    pieces: list[tuple[int, int, int, int]],
) -> np.ndarray:
    """Sum of each row's weights, float64; a piece at a time, for numpy casts what it sums."""
    sums = np.zeros(len(indptr) - 1)
    for first, last, start, stop in pieces:
        ends = np.clip(indptr[first : last + 1], start, stop) - start
        filled = np.flatnonzero(np.diff(ends))
        if len(filled):
            sums[first + filled] += np.add.reduceat(weights(start, stop, first, last), ends[filled], dtype=np.float64)
    return sums


def _pieces(indptr: np.ndarray, limits: Limits) -> Iterator[tuple[int, int, int, int]]:
    """(first row, last row, first interaction, last interaction) of chunks within the limits, in order.

    A heavy row comes alone, in as many pieces as it needs.
    """
    assert limits.heavy <= limits.interactions
    first, num_rows = 0, len(indptr) - 1
    for heavy in (*np.flatnonzero(np.diff(indptr) > limits.heavy).tolist(), num_rows):
        while first < heavy:
            start = int(indptr[first])
            last = int(np.searchsorted(indptr, start + limits.interactions, side="right")) - 1
            last = min(last, first + limits.rows, heavy)
            yield first, last, start, int(indptr[last])
            first = last
        if heavy < num_rows:
            start, stop = int(indptr[heavy]), int(indptr[heavy + 1])
            for at in range(start, stop, limits.interactions):
                yield heavy, heavy + 1, at, min(at + limits.interactions, stop)
            first = heavy + 1
