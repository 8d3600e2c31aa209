"""What a piece of work costs (wall time, CPU time, memory, bytes read), in its own process."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recpress.benchmarks.processes import PeakMemory

_FORK = multiprocessing.get_context("fork")  # what the parent has imported is not imported again


@dataclass(frozen=True)
class Cost:
    """Of one run. `cpu` counts all threads, and the processes that the work started and ended."""

    done: float
    """What the work returned: how much of it there was."""
    wall: float
    cpu: float
    peak: int
    """Bytes of resident memory at its highest, above that before the work; of worker processes, the largest is counted
    for each."""
    read: int
    """Bytes read from files, from the page cache too."""


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) in a forked process: the caller must not have running threads.

    Raises:
        RuntimeError: the process failed; its traceback is on standard error.
    """
    mine, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: theirs.send(work(*args)))
    process.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__}: its process ended with {process.exitcode}")
    return result


def cost(work: Callable[[], float], workers: int = 0) -> Cost:
    """Cost of `work` in this process; it returns how much it did, and starts `workers` processes."""
    gc.collect()
    memory = PeakMemory()
    read, wall, cpu = bytes_read(), time.perf_counter(), _cpu_seconds()
    done = work()
    wall, cpu, peak = time.perf_counter() - wall, _cpu_seconds() - cpu, memory.bytes
    children = workers * max(0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - memory.start)
    return Cost(done, wall, cpu, peak + children, bytes_read() - read)


def bytes_read() -> int:
    """Bytes that this process has read from files and pipes."""
    first = Path("/proc/self/io").read_text(encoding="ascii").splitlines()[0]
    return int(first.split()[1])


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(runs: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Each of `runs` once per round, in alternating order, so that all share a slow period of the machine."""
    found: dict[str, list[Cost]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            found[name].append(runs[name]())
    return found


def ratio(these: Sequence[Cost], those: Sequence[Cost], kind: str) -> float:
    """Median over the rounds of time per unit of `these` / that of `those`; `kind`: wall or cpu."""
    pairs = zip(these, those, strict=True)
    return statistics.median((getattr(a, kind) / a.done) / (getattr(b, kind) / b.done) for a, b in pairs)
