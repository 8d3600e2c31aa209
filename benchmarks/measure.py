"""What a piece of work costs (wall time, CPU time, memory, bytes read), in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recpress.trainer.allocator import malloc_trim

_FORK = multiprocessing.get_context("fork")  # what the parent has imported is not imported again


@dataclass(frozen=True)
class Cost:
    """Of one run. `cpu` counts all threads, and the processes that the work started and ended."""

    done: float
    """What the work returned: how much of it there was."""
    wall: float
    cpu: float
    peak: int
    """Bytes of resident memory at its highest, over what the process had before the work; of worker processes, the
    largest is counted for each."""
    read: int
    """Bytes asked of files, pages that were in memory already included."""


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) in a new process, which is forked: the caller must not have threads at work.

    Raises:
        RuntimeError: the process failed; its traceback is on standard error.
    """
    mine, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send, args=(theirs, work, args))
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


def _send(pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(work(*args))
    pipe.close()


def cost(work: Callable[[], float], workers: int = 0) -> Cost:
    """What `work`, which returns how much it did, costs in this process; `workers` is how many it starts."""
    gc.collect()
    malloc_trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before, read, wall, cpu = memory("VmRSS"), bytes_read(), time.perf_counter(), _cpu_seconds()
    done = work()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    children = workers * max(0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - before)
    return Cost(done, wall, cpu, memory("VmHWM") - before + children, bytes_read() - read)


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, VmHWM, RssAnon."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def bytes_read() -> int:
    """Bytes that this process has asked of files and pipes."""
    first = Path("/proc/self/io").read_text(encoding="ascii").splitlines()[0]
    return int(first.split()[1])


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(runs: dict[str, Callable[[], Cost]], rounds: int) -> dict[str, list[Cost]]:
    """Each of `runs` once a round, forwards and backwards by turns, so that a slow spell of the machine is shared."""
    found: dict[str, list[Cost]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            found[name].append(runs[name]())
    return found


def ratio(these: Sequence[Cost], those: Sequence[Cost], kind: str) -> float:
    """How many times as long as `those` do `these` take for as much: median over the rounds, `kind` wall or cpu."""
    pairs = zip(these, those, strict=True)
    return statistics.median((getattr(a, kind) / a.done) / (getattr(b, kind) / b.done) for a, b in pairs)
