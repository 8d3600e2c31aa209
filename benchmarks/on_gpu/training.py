"""A training step with each kind of tables: rows/s of our loop and of a bare one, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from recpress.benchmarks.loops import BARE, OURS, Case, Subject, random_batch
from recpress.benchmarks.on_gpu.device import kernels, synchronize

TABLES = ("trained", "frozen fp32", "frozen int8", "hashed", "hashed, frozen fp32", "hashed, frozen int8")


def case_of(tables: str, tiny: bool, table_rows: int = 4_500_000, dim: int = 128) -> Case:
    """The model of one kind of tables; hashed ones have a fifth of the rows."""
    table_rows, dim, batch, negatives = (600, 16, 32, 2) if tiny else (table_rows, dim, 8192, 4)
    share = 0.2 if tables.startswith("hashed") else 1.0
    return Case(
        tables=tables, loop=OURS, table_rows=table_rows, dim=dim, batch=batch, ranks=1, share=share, negatives=negatives
    )  # fmt: skip


def subject_of(case: Case, tiny: bool, device: torch.device) -> Subject:
    return Subject(case, (16,) if tiny else (256,), device)


def timed(loop: Callable[[Any], None], batches: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    loop(batches)
    synchronize(device)
    return time.perf_counter() - start


def rows(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """`peak MB` and `tables MB` are of the device: all that a run holds, and the tables as they are stored."""
    table = []
    steps, runs = (3, 1) if tiny else (50, 5)
    batches = [random_batch(case_of("trained", tiny), seed, device) for seed in range(steps)]
    for tables in TABLES:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        case = case_of(tables, tiny)
        subject = subject_of(case, tiny, device)
        seconds: dict[str, list[float]] = {OURS: [], BARE: []}
        for run in range(runs + 1):  # the first one warms up
            for loop, found in seconds.items():
                took = timed(partial(subject.train, loop=loop), batches, device)
                if run:
                    found.append(took)
        done = case.batch * steps
        table.append(
            {
                "tables": tables,
                "rows/s, our loop": done / statistics.median(seconds[OURS]),
                "rows/s, bare loop": done / statistics.median(seconds[BARE]),
                "ours / bare": statistics.median(b / a for a, b in zip(seconds[OURS], seconds[BARE], strict=True)),
                "tables MB": sum(subject.model.module.table_bytes.values()) / 1e6,
                "peak MB": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
            }
        )
        subject.close()
    return table


def profiled(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    table, steps = [], 3 if tiny else 20
    for tables in TABLES[:3]:
        case = case_of(tables, tiny, table_rows=1_200_000)
        batches = [random_batch(case, seed, device) for seed in range(steps)]
        subject = subject_of(case, tiny, device)
        table += kernels(partial(subject.train, batches, loop=BARE), device, f"{steps} steps, {tables}")
        subject.close()
    return table
