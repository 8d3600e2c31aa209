"""How do rows/s grow from one rank to two, and what does a second node cost per step?

Takes 25 s small, 3 minutes full, alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out scaling.json        # as root for the two nodes

The same global batch is trained on in one process, by two ranks on one node, and by two ranks in two network namespaces
that a veth pair joins. Cases take turns, --rounds times, each in new processes. A round takes about a minute on two
quiet cores; a run that is interrupted (Ctrl-C, SIGTERM) shows the results so far. Per step of the slower rank:

- compute: CPU time of the main thread, which runs forward, backward and optimizer;
- waiting: the rest of the main thread's time: for an exchange, for the other rank, for a core;
- exchange CPU: CPU time of all other threads, which are gloo's;
- transfer: durations of the step's collectives, each on the last rank to enter it, which waits for nobody (from a
  profile of a stretch that is not timed; they overlap with compute); MB sent: by the counters of the network interface.

`DDP's bucket setting` is the cost of find_unused_parameters, with which trainer/model/sharding.py keeps DDP's buckets
unchanged, against TorchRec's default: stretches of both take turns in the processes of `2 ranks, 1 node`. Namespaces
need root and iproute2; without them that case is not run, and the bytes on loopback are those of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.loops import OURS, Case, Subject, random_batch
from recpress.benchmarks.processes import free_port
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.model import sharding

SMALL = (
    "--table-rows", "25000", "--dim", "32", "--batch", "1024", "--steps", "8", "--stretches", "1", "--rounds", "1",
)  # fmt: skip

NODES = ("rpscale1", "rpscale2")
NETWORK = "10.213.78"
ONE, NODE, SPACES = "1 rank", "2 ranks, 1 node", "2 ranks, 2 nodes"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--table-rows", type=int, default=250_000, help="ids of users and items together")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, nargs="*", default=[256])
    parser.add_argument("--batch", type=int, default=4096, help="of all ranks together")
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--tables", choices=("trained", "frozen fp32"), default="trained")
    parser.add_argument("--steps", type=int, default=20, help="of a stretch")
    parser.add_argument("--stretches", type=int, default=2, help="of a case in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # this process is a rank: where its result goes
    args = parser.parse_args()
    if args.worker:
        work(args)
    else:
        drive(args)


# ---- the ranks


def work(args: argparse.Namespace) -> None:
    """Time this case on all of its ranks; rank 0 writes what was found."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with process_group("cpu") as ranks:
        case = Case(
            tables=args.tables, loop=OURS, table_rows=args.table_rows, dim=args.dim,
            batch=args.batch // ranks.world_size, ranks=ranks.world_size, share=1.0, negatives=args.negatives,
        )  # fmt: skip
        batches = [random_batch(case, 1000 * ranks.rank + i, ranks.device) for i in range(args.steps)]
        subjects = {"ours": Subject(case, tuple(args.hidden), ranks.device)}
        if ranks.world_size == 2 and interface == "lo":
            default = sharding.DefaultDataParallelWrapper()
            with mock.patch.object(sharding, "DefaultDataParallelWrapper", return_value=default):
                subjects["default"] = Subject(case, tuple(args.hidden), ranks.device)
        for subject in subjects.values():
            subject.train(batches)  # warms up
        found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
        for _ in range(args.stretches):
            for name, subject in subjects.items():
                found[name].append(stretch(subject, batches, interface))
        result: dict[str, Any] = {"stretches": found, "collectives": 0, "transfer": 0.0}
        if ranks.world_size > 1:
            result |= transfer(subjects["ours"], batches)
        for subject in subjects.values():
            subject.close()
        if ranks.rank == 0:
            Path(args.worker).write_text(json.dumps(result), encoding="utf-8")


def stretch(subject: Subject, batches: list[Any], interface: str) -> dict[str, float]:
    """Seconds and bytes a step; of the slower rank, and bytes that all ranks sent."""
    dist.barrier()
    before = sent(interface)
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    subject.train(batches)
    wall, thread, process = time.perf_counter() - wall, time.thread_time() - thread, time.process_time() - process
    dist.barrier()
    own = {"step": wall, "compute": thread, "waiting": wall - thread, "exchange CPU": process - thread}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own | {"bytes": sent(interface) - before})
    slower = dict(max(everyone, key=lambda rank: rank["step"]))
    # The ranks of one node share its counter; those of two nodes have one each.
    slower["bytes"] = everyone[0]["bytes"] if interface == "lo" else sum(rank["bytes"] for rank in everyone)
    return {name: value / len(batches) for name, value in slower.items()}


def transfer(subject: Subject, batches: list[Any]) -> dict[str, float]:
    """Collectives a step, and seconds a step that they take on the rank that comes last to each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        subject.train(batches)
    events = sorted((e for e in profile.events() or [] if e.name.startswith("gloo:")), key=lambda e: e.time_range.start)
    mine: dict[str, list[float]] = {}
    for event in events:
        mine.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    seconds = 0.0
    for name in mine:
        of_ranks = [rank.get(name, []) for rank in everyone]
        seconds += sum(min(each) for each in zip(*of_ranks, strict=False))  # in the same order on all
    return {"collectives": len(events) / len(batches), "transfer": seconds / len(batches)}


def sent(interface: str) -> int:
    """Bytes that the interface, as this process sees it, has sent."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise RuntimeError(f"no network interface {interface}")


# ---- the cases


def drive(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed
    runs: dict[str, list[dict[str, Any]]] = {}
    try:
        with nodes() as (found, reason):
            if not found:
                print(f"without {SPACES}: {reason}", flush=True)
            first: list[str | None] = [*found[:1]] or [None]
            cases: dict[str, list[str | None]] = {ONE: first, NODE: 2 * first}
            if found:
                cases[SPACES] = list(found)
            for number in range(args.rounds):
                for case, places in cases.items():
                    result = run(args, places)
                    runs.setdefault(case, []).append(result)
                    each = [1e3 * s["step"] for s in result["stretches"]["ours"]]
                    print(f"round {number + 1}, {case}: {statistics.median(each):.1f} ms a step", flush=True)
    finally:
        if runs:
            report(args, runs)  # what there is, of a run that is interrupted


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The table of all cases that have run."""
    rows = [row(case, runs, args.batch) for case in runs]
    ratios = [
        ours["step"] / default["step"]
        for result in runs.get(NODE, [])
        for ours, default in zip(result["stretches"]["ours"], result["stretches"]["default"], strict=True)
    ]
    if ratios:
        rows[1]["DDP's bucket setting"] = f"{100 * (statistics.median(ratios) - 1):+.1f} %"
    publish("1 rank, 2 ranks, 2 nodes: rows/s, and a step of the slower rank", rows, out=args.out,
            settings=settings_of(vars(args), ("out", "worker")),
            plots=[bars(["rows/s", "step ms", "compute ms", "waiting ms"], ["case"],
                        title="The same global batch; a step of the slower rank")])  # fmt: skip


def row(case: str, runs: dict[str, list[dict[str, Any]]], batch: int) -> dict[str, Any]:
    def median(name: str, of: str = case) -> float:
        return statistics.median(s[name] for result in runs[of] for s in result["stretches"]["ours"])

    ratio = statistics.median(
        statistics.median(s["step"] for s in alone["stretches"]["ours"])
        / statistics.median(s["step"] for s in these["stretches"]["ours"])
        for alone, these in zip(runs[ONE], runs[case], strict=False)  # the last round may be cut off
    )
    return {
        "case": case,
        "rounds": len(runs[case]),
        "rows/s": round(batch / median("step")),
        "ratio to 1 rank": round(ratio, 3),
        "step ms": 1e3 * median("step"),
        "compute ms": 1e3 * median("compute"),
        "waiting ms": 1e3 * median("waiting"),
        "exchange CPU ms": 1e3 * median("exchange CPU"),
        "transfer ms": 1e3 * statistics.median(result["transfer"] for result in runs[case]),
        "collectives": round(statistics.median(result["collectives"] for result in runs[case]), 1),
        "MB sent": median("bytes") / 1e6 if case != ONE else 0.0,
    }


def run(args: argparse.Namespace, places: list[str | None]) -> dict[str, Any]:
    """One case in new processes, one in each of `places` (a namespace; None: that of this process)."""
    apart = len(set(places)) > 1
    options = [str(Path(__file__).resolve())]
    for name, value in vars(args).items():
        if name not in ("out", "worker"):
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MASTER_ADDR": f"{NETWORK}.1" if apart else "127.0.0.1", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(places))}
        environment |= {"GLOO_SOCKET_IFNAME": "eth0" if apart else "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment["LOCAL_WORLD_SIZE"] = str(1 if apart else len(places))
        processes = []
        try:
            for rank, place in enumerate(places):
                prefix = ["ip", "netns", "exec", place] if place else []
                own = {"RANK": str(rank), "LOCAL_RANK": str(0 if apart else rank)}
                command = [*prefix, sys.executable, "-W", "ignore", *options, "--worker", f"{folder}/result"]
                with open(f"{folder}/{rank}.log", "wb") as log:
                    processes.append(subprocess.Popen(command, env=environment | own, stdout=log, stderr=log))
            for rank, process in enumerate(processes):
                if process.wait(timeout=600):
                    raise RuntimeError(f"rank {rank}: " + Path(f"{folder}/{rank}.log").read_text()[-3000:])
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads(Path(f"{folder}/result").read_text())


# ---- two nodes


@contextmanager
def nodes() -> Iterator[tuple[list[str], str]]:
    """Two namespaces that a cable joins, removed at the end; or none, and why."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield [], "network namespaces need root and iproute2"
        return
    remove_nodes()  # of a run that was killed
    try:
        reason = make_nodes()
        yield ([], reason) if reason else (list(NODES), "")
    finally:
        remove_nodes()


def make_nodes() -> str:
    """Empty, or the error of the first command that failed."""
    first, second = NODES
    commands = [f"netns add {node}" for node in NODES]
    commands += [f"link add eth0 netns {first} type veth peer name eth0 netns {second}"]
    for k, node in enumerate(NODES, 1):
        commands += [f"-n {node} addr add {NETWORK}.{k}/24 dev eth0", f"-n {node} link set eth0 up"]
        commands += [f"-n {node} link set lo up"]
        # No DNS: torch's store looks every peer up by its address, 10 s each where nothing answers.
        etc = Path("/etc/netns") / node
        etc.mkdir(parents=True, exist_ok=True)
        hosts = ["127.0.0.1 localhost", *(f"{NETWORK}.{j} {other}" for j, other in enumerate(NODES, 1))]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"ip {command}: {done.stderr.strip()}"
    return ""


def remove_nodes() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / node, ignore_errors=True)


if __name__ == "__main__":
    main()
