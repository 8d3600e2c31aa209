"""A profile of some steps: a trace per rank, for Perfetto, and a table of the parts of a step."""

from __future__ import annotations

import gzip
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from recpress.data.dataset import object_store
from recpress.trainer.checkpoint.file_bytes import describe
from recpress.trainer.config import ProfileConfig
from recpress.trainer.observability.step_parts import PARTS, step_parts

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""In the folder of the run's metrics."""
TRACE = "trace-rank-{}.json.gz"
BREAKDOWN = "breakdown.json"


class Profiler:
    """Profiles `config.steps` steps of the train loop, after `config.start`, and writes into `folder`. Collective.

    Use it in a `with` around the loop, and call `step` after each step. A run that ends by an error writes no profile.

    Args:
        folder: of the run's metrics; the one of rank 0 gets the traces of all ranks.
    """

    def __init__(self, config: ProfileConfig, folder: str | Path, device: torch.device) -> None:
        self.config, self.folder = config, Path(folder) / FOLDER
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self._done = 0
        self._marks: list[float] = []
        self._profile: profile | None = None

    def __enter__(self) -> Profiler:
        warmup = min(1, self.config.start)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=self.config.start - warmup, warmup=warmup, active=self.config.steps, repeat=1),
            on_trace_ready=self._ready,
        )
        self._profile.start()
        self._marks = [time.perf_counter()]
        return self

    def step(self) -> None:
        """After each step."""
        if self._profile is None:
            return
        self._done += 1
        self._marks.append(time.perf_counter())
        self._profile.step()
        if self._done == self.config.start + self.config.steps:
            self._profile.stop()
            self._profile = None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._profile is None:
            return
        if kind is not None:  # other ranks may have ended
            self._done = 0
        elif self._done <= self.config.start and self.rank == 0:
            logger.warning(
                "no profile: the run ended after %d steps, profile.start is %d", self._done, self.config.start
            )
        self._profile.stop()
        self._profile = None

    def _ready(self, made: profile) -> None:
        steps = min(self._done - self.config.start, self.config.steps)
        if steps < 1:
            return
        try:
            mine: dict[str, float] | str = self._write_trace(made, steps)
        except (OSError, ValueError, RuntimeError) as error:  # for example a full disk; training continues
            mine = f"rank {self.rank}: {error}"
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        problem = next((found for found in everyone if isinstance(found, str)), None)
        if problem is None:
            self._collect_traces()
        if self.rank == 0 and problem is None:
            logger.info("%s", self._write_breakdown(everyone, steps))
        elif self.rank == 0:
            logger.warning("no profile: %s", problem)

    def _write_trace(self, made: profile, steps: int) -> dict[str, float]:
        """Milliseconds of the parts of a step of this rank, and of the whole `step` by the clock of the loop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / TRACE.format(self.rank)
        partial = self.folder / f".{trace.name}.tmp.gz"
        made.export_chrome_trace(str(partial))
        with gzip.open(partial) as file:
            parts = step_parts(json.load(file)["traceEvents"], steps)
        partial.replace(trace)
        seconds = self._marks[self.config.start + steps] - self._marks[self.config.start]
        return {"step": 1000 * seconds / steps, **parts}

    def _collect_traces(self) -> None:
        """Copy traces of ranks on other disks to the folder of rank 0, one after the other. Collective."""
        trace = self.folder / TRACE.format(self.rank)
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, describe(trace))
        wanted = [[self.rank == 0 and not self._has(rank, described) for rank, described in enumerate(everyone)]]
        dist.broadcast_object_list(wanted, 0)
        for rank in [rank for rank, missing in enumerate(wanted[0]) if missing]:
            content: list[Any] = [None]
            if self.rank == rank:
                dist.send_object_list([trace.read_bytes()], 0, device=torch.device("cpu"))
            elif self.rank == 0:
                dist.recv_object_list(content, rank, device=torch.device("cpu"))
                try:
                    (self.folder / TRACE.format(rank)).write_bytes(content[0])
                except OSError as error:
                    logger.warning("no trace of rank %d: %s", rank, error)

    def _has(self, rank: int, described: dict[str, Any]) -> bool:
        trace = self.folder / TRACE.format(rank)
        return trace.is_file() and describe(trace) == described

    def _write_breakdown(self, everyone: list[dict[str, float]], steps: int) -> str:
        """Write BREAKDOWN; return it as text."""
        found = self._summary(everyone, steps)
        object_store.write_bytes(self.folder / BREAKDOWN, json.dumps(found, indent=1).encode())
        return f"{table(found)}\nprofile: {self.folder} (traces open in https://ui.perfetto.dev)"

    def _summary(self, everyone: list[dict[str, float]], steps: int) -> dict[str, Any]:
        """The content of BREAKDOWN; times in milliseconds per step."""
        whole = sum(sum(rank[part] for part in PARTS) for rank in everyone)
        parts = {}
        for part in PARTS:
            each = [rank[part] for rank in everyone]
            parts[part] = {
                "ms": sum(each) / self.world,
                "share": sum(each) / whole,
                "slowest_ms": max(each),
                "slowest_rank": each.index(max(each)),
            }
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "ranks": self.world,
            "first_step": self.config.start + 1,
            "steps": steps,
            "step_ms": sum(rank["step"] for rank in everyone) / self.world,
            "parts": parts,
            "by_rank": everyone,
        }


def table(found: dict[str, Any]) -> str:
    """The breakdown as text."""
    steps = "1 step" if found["steps"] == 1 else f"{found['steps']} steps"
    ranks = "1 rank" if found["ranks"] == 1 else f"mean of {found['ranks']} ranks"
    lines = [
        f"{steps} of {found['step_ms']:.1f} ms with the profiler on, {ranks}, {found['device']}",
        f"{'':21}{'ms per step':>11}{'share':>8}{'slowest rank':>22}",
    ]
    for part, numbers in found["parts"].items():
        slowest = f"{numbers['slowest_ms']:.2f} (rank {numbers['slowest_rank']})"
        lines.append(f"{part:22}{numbers['ms']:10.2f}{numbers['share']:8.1%}{slowest:>22}")
    lines.append(f"{'sum':22}{sum(n['ms'] for n in found['parts'].values()):10.2f}{1:8.1%}")
    return "\n".join(lines)
