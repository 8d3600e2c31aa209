"""Weighted least squares for implicit feedback, sharded over ranks (Hu, Koren, Volinsky 2008)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from recpress.modules.als_solvers import Chunk, Shared, preconditioner, solve_cg
from recpress.modules.config import ALSConfig
from recpress.modules.factors import Factors, RowBlocks
from recpress.modules.interactions import CSR, Exchange, InteractionBuilder

_CHUNK_NNZ = 1 << 17  # interactions of a chunk of rows: bounds the working memory
_CG_STEPS = 2


@dataclass(frozen=True)
class SweepReport:
    """One sweep that ended: its number from 1, the objective after it, its seconds, and those left."""

    sweep: int
    sweeps: int
    objective: float
    seconds: float
    eta: float


class ALS:
    """Factorizes the interactions that all ranks add. Every rank makes one, adds its part, and calls `fit`.

    Users and items are sharded in contiguous blocks (`RowBlocks`); no rank holds the whole log.
    """

    def __init__(
        self,
        config: ALSConfig,
        num_users: int,
        num_items: int,
        *,
        device: str | torch.device = "cpu",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.exchange = Exchange(process_group, self.device)
        self.builder = InteractionBuilder(num_users, num_items, self.exchange)
        self.num_users, self.num_items = num_users, num_items

    def add(self, users: Any, items: Any, values: Any = None) -> None:
        """Add interactions: two arrays (n,) of integer ids, numpy or torch, of any rows, and values >= 0 (n,).

        Without values each counts one; the values of a pair that comes more than once, on any rank, are summed.
        Raises ValueError that names the interaction whose id or value is bad.
        """
        self.builder.add(*(None if x is None else np.asarray(x) for x in (users, items, values)))

    def fit(
        self, on_sweep: Callable[[SweepReport], bool | None] | None = None, start: Factors | None = None
    ) -> Factors:
        """Run the sweeps. `on_sweep` sees each one's report and stops the fit by returning True (on any rank).

        start: factors of the same sharding to go on from, instead of the random ones. The interactions are used up.
        """
        config = self.config
        by_user, by_item = self.builder.build()
        sides = [
            _Side(by_user, self.num_users, self.num_items, config, self.exchange, self.device),
            _Side(by_item, self.num_items, self.num_users, config, self.exchange, self.device),
        ]
        if start is None:
            rank, world = self.exchange.rank, self.exchange.world
            factors = initial_factors(config, self.num_users, self.num_items, rank, world, self.device)
        else:
            if start.dim != config.factors:
                raise ValueError(f"start factors: dimension {start.dim}, expected {config.factors}")
            factors = Factors(
                start.users.to(self.device, torch.float32, copy=True),
                start.items.to(self.device, torch.float32, copy=True),
                start.num_users, start.num_items, start.rank, start.world,
            )  # fmt: skip
        users, items = sides
        previous, began = float("inf"), time.perf_counter()
        item_grams = items.gramians(factors.items)
        for sweep in range(1, config.sweeps + 1):
            at = time.perf_counter()
            users.solve(factors.users, factors.items, item_grams)
            user_grams = users.gramians(factors.users)
            loss = items.solve(factors.items, factors.users, user_grams)
            item_grams = items.gramians(factors.items)
            loss += users.penalty(factors.users) + items.penalty(factors.items)
            loss = float(self.exchange.sum(torch.tensor(loss, dtype=torch.float64, device=self.device)))
            loss += config.unobserved_weight * float((user_grams[0] * item_grams[0]).sum())
            if not np.isfinite(loss):
                raise ValueError(
                    f"als: the objective is {loss} after sweep {sweep}, expected a finite number"
                )
            now = time.perf_counter()
            report = SweepReport(
                sweep, config.sweeps, loss, now - at, (now - began) / sweep * (config.sweeps - sweep)
            )
            stop = bool(on_sweep(report)) if on_sweep is not None else False
            stop |= config.tolerance > 0 and previous - loss < config.tolerance * abs(previous)
            if self.exchange.max(int(stop)):
                break
            previous = loss
        return factors


class _Side:
    """One side's rows of this rank, with what their half-sweeps need."""

    def __init__(
        self,
        csr: CSR,
        num_rows: int,
        num_others: int,
        config: ALSConfig,
        exchange: Exchange,
        device: torch.device,
    ) -> None:
        self.config, self.exchange, self.device = config, exchange, device
        self.csr = csr
        self.other_blocks = RowBlocks(num_others, exchange.world)
        self.degree = torch.from_numpy(np.diff(csr.indptr)).to(device, torch.float32)
        self.weight = self.degree * config.confidence
        if csr.values is not None:
            sums = np.add.reduceat(np.append(csr.values, np.float32(0)), csr.indptr[:-1]) * (
                np.diff(csr.indptr) > 0
            )
            self.weight = torch.from_numpy(sums.astype(np.float32)).to(device) * config.confidence
        self.nnz = int(exchange.sum(torch.tensor(len(csr.indices), device=device)))
        base = config.unobserved_weight * num_others
        self.reg = config.regularization * (self.degree + base) ** config.frequency_exponent
        # the line through the regularization of no interactions and of twice the mean number
        far = max(2 * self.nnz / num_rows, 1.0)
        at_zero, at_far = (
            config.regularization * (n + base) ** config.frequency_exponent for n in (0.0, far)
        )
        self.reg_line = (at_zero, (at_far - at_zero) / far)
        self.chunks = list(_chunks(csr.indptr, _CHUNK_NNZ))
        self.rounds = exchange.max(len(self.chunks))

    def gramians(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sum y y' over all rows of all ranks, and the mean of w y y' over all interactions, (d, d) float64."""
        plain, weighted = rows.new_zeros((2, rows.shape[1], rows.shape[1]), dtype=torch.float64)
        for first in range(0, len(rows), 8192):  # float32 within a block, float64 between them
            part = rows[first : first + 8192]
            plain += part.T @ part
            weighted += part.T @ (part * self.weight[first : first + 8192, None])
        both = self.exchange.sum(torch.stack((plain, weighted)))
        return both[0], both[1] / max(self.nnz, 1)

    def penalty(self, rows: torch.Tensor) -> float:
        """Sum of reg |x|^2 over this rank's rows."""
        return float(torch.dot(rows.square().sum(1), self.reg))

    def solve(
        self, rows: torch.Tensor, others: torch.Tensor, grams: tuple[torch.Tensor, torch.Tensor]
    ) -> float:
        """Solve all rows in place; returns the loss of this rank's interactions, less that of all its pairs at w_0."""
        w0 = self.config.unobserved_weight
        basis, scale = preconditioner(w0 * grams[0], grams[1], self.reg_line)
        gramian = (w0 * grams[0]).to(torch.float32)
        shared = Shared(gramian, w0, basis.to(gramian), scale.to(gramian))
        loss = 0.0
        for k in range(self.rounds):
            first, last = self.chunks[k] if k < len(self.chunks) else (0, 0)
            chunk = self.chunk(first, last, rows, others)
            if first == last:
                continue
            rows[first:last], scores = solve_cg(chunk, shared, _CG_STEPS)
            error = (1 - scores).square_().mul_(chunk.weights).add_(scores, alpha=-2 * w0)
            loss += float(error.sum(dtype=torch.float64)) + w0 * len(scores)
        return loss

    def chunk(self, first: int, last: int, rows: torch.Tensor, others: torch.Tensor) -> Chunk:
        """Rows first..last-1 with the other side's vectors that they touch. Collective."""
        start, stop = int(self.csr.indptr[first]), int(self.csr.indptr[last])
        indptr = torch.from_numpy((self.csr.indptr[first : last + 1] - start).astype(np.int32)).to(
            self.device
        )
        indices = torch.from_numpy(self.csr.indices[start:stop]).to(self.device)
        weights: torch.Tensor | float = self.config.confidence
        if self.csr.values is not None:
            weights = torch.from_numpy(self.csr.values[start:stop]).to(self.device) * self.config.confidence
        table = others
        if self.exchange.world > 1:
            ids, indices = torch.unique(indices, return_inverse=True)
            table, indices = self.exchange.rows(others, ids, self.other_blocks), indices.to(torch.int32)
        begin = rows[first:last] * (self.degree[first:last, None] > 0)
        return Chunk(indptr, indices, weights, table, self.reg[first:last], begin)


def _chunks(indptr: np.ndarray, nnz: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `nnz` interactions (or one row) and 65536 rows."""
    first, rows = 0, len(indptr) - 1
    while first < rows:
        last = int(np.searchsorted(indptr, indptr[first] + nnz, side="right")) - 1
        last = min(max(last, first + 1), first + 65536, rows)
        yield first, last
        first = last


def initial_rows(seed: int, side: int, first: int, last: int, dim: int) -> np.ndarray:
    """Rows first..last-1 of a side's initial vectors, (last - first, dim) float32: uniform with std 0.1 / sqrt(dim).

    A pure function of (seed, side, row), so that every world size starts alike: Philox counts 8 float32 a step.
    """
    width = -(-dim // 8) * 8
    bits = np.random.Philox(key=[seed % 2**64, side]).advance(first * width // 8)
    rows = np.random.Generator(bits).random((last - first, width), dtype=np.float32)[:, :dim]
    return (rows - np.float32(0.5)) * np.float32(0.1 * (12 / dim) ** 0.5)


def initial_factors(
    config: ALSConfig, num_users: int, num_items: int, rank: int, world: int, device: torch.device
) -> Factors:
    """The random factors that a fit begins with."""
    shards = []
    for side, count in enumerate((num_users, num_items)):
        blocks = RowBlocks(count, world)
        begin, end = blocks.start(rank), blocks.stop(rank)
        shard = torch.empty(end - begin, config.factors, device=device)
        for first in range(begin, end, 65536):
            last = min(first + 65536, end)
            rows = initial_rows(config.seed, side, first, last, config.factors)
            shard[first - begin : last - begin] = torch.from_numpy(rows).to(device)
        shards.append(shard)
    return Factors(shards[0], shards[1], num_users, num_items, rank, world)
