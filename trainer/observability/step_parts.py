"""Where the time of training steps goes: parts that add up to the wall time, from a trace of torch.profiler.

torch.profiler's own tables give the time of operators, and Holistic Trace Analysis the compute, communication and idle
time of GPUs. Neither has the stages of TorchRec's pipeline, nor CPU ranks, nor sums that equal the wall time.

On a CPU, each moment of the trainer's thread belongs to the innermost range that names a part. At the end of the
backward pass that thread waits for the all-reduce of gradients; that time belongs to the collective.

On CUDA, each moment belongs to what the device computes, by the range in which the host launched it; else to a
collective that no computation hides; else, if the device is idle and the host waits for data, to waiting. The rest,
copies and a device that waits for launches, is `other`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

DATA = "## recpress: next batch ##"
"""Range of the train loop around the call for the next batch."""
PAUSE = "## recpress: evaluation ##"
"""Range of work that is not training."""
WAITING, REMAPPING, IDS, VECTORS, SUMS, LOOKUP, FORWARD, BACKWARD, OPTIMIZER, OTHER = PARTS = (
    "waiting for data",
    "remapping",
    "exchange: ids",
    "exchange: vectors",
    "exchange: all-reduce",
    "lookup",
    "dense forward",
    "dense backward",
    "optimizer",
    "other",
)
STEP = "ProfilerStep#"
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (WAITING, (DATA,)),
    (PAUSE, (PAUSE,)),
    (REMAPPING, ("## input_postproc",)),
    (IDS, ("all2all_data", "KJT", "sparse_data_dist", "splits_dist", "input_dist", "SplitsAllToAll")),
    (SUMS, ("c10d::allreduce", "AllReduce", "all_reduce")),
    (VECTORS, ("output_dist", "All2All_Pooled", "all2all_pooled", "wait() ##", "ReduceScatter", "reduce_scatter")),
    (VECTORS, ("AllGather", "all_gather", "all_to_all", "alltoall")),
    (OPTIMIZER, ("## optimizer", "## zero_grad")),
    (LOOKUP, ("[lookup]", "split_embedding_codegen", "SplitLookupFunction", "SplitNoWeightDecay")),
    (FORWARD, ("## forward",)),
    (BACKWARD, ("## backward", "autograd::engine")),
)
"""A part, and substrings of the names of its ranges: annotations of TorchRec, operators of fbgemm and torch. The first
match counts."""

Event = Mapping[str, Any]
"""One of `traceEvents` in Chrome's format; times are in microseconds."""
Span = tuple[float, float]


def step_parts(events: Iterable[Event], steps: int) -> dict[str, float]:
    """Milliseconds per step of each of PARTS, which add up to the wall time of the first `steps` steps in the trace.

    Raises:
        ValueError: the trace has fewer steps.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    marked = [event for event in spans if event["name"].startswith(STEP) and event["cat"] == "user_annotation"]
    marked = sorted(marked, key=lambda event: event["ts"])[:steps]
    if not marked or len(marked) < steps:
        raise ValueError(f"the trace has {len(marked)} steps, expected {steps}")
    begin, end = float(marked[0]["ts"]), float(marked[-1]["ts"] + marked[-1]["dur"])
    threads: dict[Any, list[Event]] = defaultdict(list)
    kernels: list[Event] = []
    for event in spans:
        if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif event["cat"] in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event["tid"]].append(event)
    trainer = list(_moments(threads.pop(marked[0]["tid"]), begin, end))
    others = [moment for thread in threads.values() for moment in _moments(thread, begin, end)]
    found = _of_device(trainer, others, kernels, (begin, end)) if kernels else _of_host(trainer, others)
    found.pop(PAUSE, None)
    found[OTHER] += (end - begin) - sum(found.values())
    return {part: found[part] / 1000 / steps for part in PARTS}


class _Moment:
    """An interval of a thread with the same innermost range."""

    __slots__ = ("begin", "end", "launch", "name", "part")

    def __init__(self, begin: float, end: float, name: str, part: str, launch: Any) -> None:
        self.begin, self.end, self.name, self.part, self.launch = begin, end, name, part, launch


def _moments(events: list[Event], begin: float, end: float) -> Iterator[_Moment]:
    """The intervals of a thread between begin and end, from its nested ranges; without the time outside of ranges."""
    stack: list[tuple[float, str, str, Any]] = []  # end, name, part, correlation
    at = begin

    def until(time: float) -> Iterator[_Moment]:
        nonlocal at
        while stack:
            last, name, part, launch = stack[-1]
            stop = min(last, time, end)
            if stop > at:
                yield _Moment(at, stop, name, part, launch)
                at = stop
            if last > time:
                break
            stack.pop()
        at = max(at, min(time, end))

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        yield from until(event["ts"])
        above = stack[-1][2] if stack else OTHER
        part = above if above == PAUSE else _part(event["name"]) or above
        launch = (event.get("args") or {}).get("correlation")
        stack.append((event["ts"] + event["dur"], event["name"], part, launch))
    yield from until(end)


def _part(name: str) -> str | None:
    return next((part for part, signs in _NAMES if any(sign in name for sign in signs)), None)


def _of_host(trainer: Sequence[_Moment], others: Sequence[_Moment]) -> dict[str, float]:
    """Microseconds of each part, by the trainer's thread."""
    found = dict.fromkeys(PARTS, 0.0)
    stands: list[Span] = []
    for moment in trainer:
        if moment.part == BACKWARD and "## backward" in moment.name:
            stands.append((moment.begin, moment.end))
        else:
            found[moment.part] = found.get(moment.part, 0.0) + moment.end - moment.begin
    collectives = [(m.begin, m.end, m.part) for m in others if m.name.startswith("gloo:")]
    rest = _take(found, stands, collectives)
    found[BACKWARD] += sum(stop - start for start, stop in rest)
    return found


def _of_device(
    trainer: Sequence[_Moment], others: Sequence[_Moment], kernels: Sequence[Event], whole: Span
) -> dict[str, float]:
    """Microseconds of each part, by the activity of the device."""
    launched = {m.launch: m.part for m in (*trainer, *others) if m.launch is not None}
    compute: list[tuple[float, float, str]] = []
    collectives: list[tuple[float, float, str]] = []
    for kernel in kernels:
        if kernel["cat"] != "kernel":
            continue
        part = launched.get((kernel.get("args") or {}).get("correlation"), OTHER)
        nccl = kernel["name"].startswith("nccl")
        if nccl and part not in (IDS, VECTORS):
            part = _part(kernel["name"]) or VECTORS
        (collectives if nccl else compute).append((kernel["ts"], kernel["ts"] + kernel["dur"], part))
    found = dict.fromkeys(PARTS, 0.0)
    free = _take(found, [whole], compute)
    free = _take(found, free, collectives)
    copies = [(k["ts"], k["ts"] + k["dur"], OTHER) for k in kernels if k["cat"] != "kernel"]
    free = _take(found, free, copies)
    _take(found, free, [(m.begin, m.end, WAITING) for m in trainer if m.part == WAITING])
    return found


def _take(found: dict[str, float], free: Sequence[Span], claims: Iterable[tuple[float, float, str]]) -> list[Span]:
    """Add to the part of each claim the free time that it covers and no earlier claim does; return what stays free.

    `free` is sorted by time and does not overlap.
    """
    left: list[Span] = []
    in_order = sorted(claims)
    first = 0
    for begin, end in free:
        at = begin
        while first < len(in_order) and in_order[first][1] <= begin:
            first += 1
        for index in range(first, len(in_order)):
            start, stop, part = in_order[index]
            if start >= end:
                break
            if stop <= at:
                continue
            if start > at:
                left.append((at, start))
            begun = max(start, at)
            at = min(stop, end)
            found[part] = found.get(part, 0.0) + at - begun
        if at < end:
            left.append((at, end))
    return left
