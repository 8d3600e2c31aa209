"""Sweeps of `als`, and what share of the device they use."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recpress.benchmarks.on_gpu.device import Ceilings, kernels
from recpress.modules.als.factorization import ALS, SweepReport
from recpress.modules.config import ALSConfig

SWEEPS = 8


@dataclass(frozen=True)
class Size:
    users: int
    items: int
    rows: int


def made(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Pairs, both sides falling off as powers."""
    rng = np.random.default_rng(0)
    users = (size.users * rng.random(size.rows) ** 1.5).astype(np.int32)
    return users, (size.items * rng.random(size.rows) ** 2.5).astype(np.int32)


def work(distinct: int, size: Size, dim: int) -> tuple[float, float]:
    """Bytes and flop that a sweep of `auto` from the third on cannot do without, of both sides together.

    A side's step of conjugate gradients goes three times over its interactions, each time gathering a vector of the
    other side and multiplying and adding it (`solve_cg`: two predictions, one weighted sum), and four times over its
    rows with a (dim, dim) matrix; its summary twice more.
    """
    both = size.users + size.items
    gathered = 2 * 3 * distinct * (4 * dim + 4)
    return gathered + 8 * 4 * dim * both, 2 * 3 * 2 * distinct * dim + 6 * 2 * dim**2 * both


def fit(log: tuple[np.ndarray, np.ndarray], size: Size, dim: int, device: torch.device) -> tuple[float, int]:
    """Median seconds of a sweep from the third on, and the distinct pairs."""
    als = ALS(ALSConfig(factors=dim, sweeps=SWEEPS, confidence=3.0), size.users, size.items, device=device)
    als.add(*log)
    found: list[float] = []

    def on_sweep(report: SweepReport) -> None:  # its objective is read from the device, so the sweep is through
        found.append(report.seconds)

    factors = als.fit(on_sweep)
    assert bool(torch.isfinite(factors.users).all())
    assert factors.user_counts is not None
    return statistics.median(found[2:-1]), int(factors.user_counts.sum(dtype=torch.float64))


def rows(device: torch.device, best: Ceilings, tiny: bool) -> Iterator[dict[str, Any]]:
    size = Size(300, 200, 5000) if tiny else Size(1_000_000, 200_000, 40_000_000)
    log = made(size)
    for dim in (16, 8) if tiny else (128, 64):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        took, distinct = fit(log, size, dim, device)
        moved, flop = work(distinct, size, dim)
        yield {
            "users": size.users,
            "items": size.items,
            "interactions": distinct,
            "factors": dim,
            "sweeps/s": 1 / took,
            "GB/s": moved / took / 1e9,
            "of copy %": 100 * moved / took / best.copy,
            "TFLOP/s": flop / took / 1e12,
            "of fp32 matmul %": 100 * flop / took / best.fp32,
            "peak MB": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
        }


def profiled(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    size = Size(300, 200, 5000) if tiny else Size(200_000, 50_000, 8_000_000)
    log = made(size)
    return kernels(lambda: fit(log, size, 8 if tiny else 128, device), device, f"factorization, {SWEEPS} sweeps")
