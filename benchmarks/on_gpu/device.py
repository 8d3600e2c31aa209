"""What the device can do at most, how long work takes on it, and which kernels take the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Job = Callable[[], Any]
KERNELS = 15


@dataclass(frozen=True)
class Ceilings:
    """Of this device, measured in this run."""

    copy: float
    """Bytes/s of a large copy within the device's memory, read plus written."""
    fp32: float
    """Flop/s of a large product of float32 matrices, as torch is set up."""
    bf16: float

    def row(self) -> dict[str, Any]:
        return {
            "copy GB/s": self.copy / 1e9,
            "fp32 matmul TFLOP/s": self.fp32 / 1e12,
            "bf16 matmul TFLOP/s": self.bf16 / 1e12,
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Job, device: torch.device, runs: int = 5, warm: int = 2) -> float:
    """Median wall time of a job, the device's part of it included."""
    found = []
    for run in range(warm + runs):
        synchronize(device)
        start = time.perf_counter()
        job()
        synchronize(device)
        if run >= warm:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def ceilings(device: torch.device, tiny: bool) -> Ceilings:
    """Copies far beyond the caches and products of matrices that fill the device; 20 of each between two clocks."""
    source = torch.empty((1 << 20) if tiny else (1 << 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _repeated(partial(target.copy_, source), device)
    del source, target
    size, rates = 128 if tiny else 8192, []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size, device=device).to(dtype)
        rates.append(2 * size**3 / _repeated(partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix)), device))
    return Ceilings(copy, *rates)


def _repeated(job: Job, device: torch.device, count: int = 20) -> float:
    """Seconds of a job, one after the other between two readings of the clock."""
    return seconds(lambda: [job() for _ in range(count)], device, runs=3, warm=1) / count


def kernels(job: Job, device: torch.device, what: str) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operators) that take the most of the device's time in one run of a job, as table rows."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    job()
    synchronize(device)
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        job()
        synchronize(device)
        wall = time.perf_counter() - start
    events = recorded.key_averages()
    if cuda:  # what ran on the device; operators of the host only launch
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    took = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
    total = sum(micro for micro, _, _ in took)
    rows = [{"what": what, "kernel": "all", "ms": total / 1e3, "of wall %": total / wall / 1e4, "of all %": 100.0}]
    for micro, calls, name in sorted(took, reverse=True)[:KERNELS]:
        share = {"of wall %": micro / wall / 1e4, "of all %": 100 * micro / max(total, 1e-9)}
        rows.append({"what": what, "kernel": name[:70], "calls": calls, "ms": micro / 1e3, **share})
    return rows
