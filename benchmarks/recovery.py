"""How long is it from the kill of a worker to the first new step, on a Slurm of two nodes?

    python benchmarks/recovery.py --kills 5

Four ranks on two nodes train, with a checkpoint after every step; `kill -9` ends one rank of the second node, and the
clock runs until a later checkpoint than any before the kill is complete. That includes torchrun's detection, a new
rendezvous, the start of Python on all ranks, planning, loading the checkpoint and the step itself. Also: seconds from
`torchx run` to the first step.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the fixture of the cluster tests

from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.data.config import SynthConfig
from recpress.data.synthetic.interactions import synth
from tests.cluster.conftest import Jobs
from tests.cluster.slurm import NODES, Slurm, wait_until

SMALL = ("--kills", "1")
NEEDS = "a checkout, root, Debian and scripts/install-cluster.sh"


def newest(out: Path) -> int:
    """The step of the newest complete checkpoint; -1 if there is none."""
    steps = [int(path.name.rpartition("-")[2]) for path in out.with_name(f"{out.name}.checkpoints").glob("step-*")]
    return max(steps, default=-1)


def _newer(out: Path, step: int) -> bool:
    return newest(out) > step


def measure(kills: int, folder: Path) -> dict[str, list[float]]:
    """Times of each kill, and of the start."""
    log = str(synth(SynthConfig(users=800, items=600, rows=24_000, tastes=8, tastes_per_user=4), folder / "log"))
    out = folder / "model"
    (folder / "slurm").mkdir(mode=0o755)
    slurm = Slurm(folder / "slurm")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the daemons end
    try:
        slurm.start()
        (folder / "jobs").mkdir()
        jobs = Jobs(slurm, folder / "jobs")
        began = time.monotonic()
        words = ["--data", log, "--out", str(out), "--sample.rate", "1", "--epochs", "1000"]
        words += ["--stream.batch-size", "64"]
        words += ["--model.tables.strategy", "random", "--model.tables.dim", "8", "--model.towers.hidden", "16"]
        words += ["--negatives.count", "16", "--no-tensorboard", "--checkpoint.steps", "1"]
        job = jobs.submit("train", *words, options=("--max_restarts", str(kills)))
        wait_until(lambda: newest(out) >= 0, "the first step", 120, every=0.02)
        first = time.monotonic() - began
        recoveries = []
        for _ in range(kills):
            time.sleep(5)
            victim = jobs.workers(NODES[1], "train")[0]
            before = newest(out)
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            time.sleep(0.5)  # a checkpoint in progress becomes complete
            before = max(before, newest(out))
            wait_until(partial(_newer, out, before), "a step after the kill", 180, every=0.02)
            recoveries.append(round(time.monotonic() - killed, 2))
            print(f"kill {len(recoveries)}: {recoveries[-1]} s", flush=True)
        jobs.slurm.run(["scancel", job])
    finally:
        slurm.stop()
    return {"start": [round(first, 2)], "recovery": recoveries}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        Path(folder).chmod(0o755)
        found = measure(args.kills, Path(folder))
    publish(
        "Recovery: seconds to the first new step, two nodes of two ranks",
        [
            {"from": "torchx run", "seconds": found["start"][0], "runs": 1},
            {"from": "kill -9 of a worker, median", "seconds": statistics.median(found["recovery"])}
            | {"runs": args.kills, "least": min(found["recovery"]), "most": max(found["recovery"])},
        ],
        out=args.out,
        settings=settings_of(vars(args)),
    )


if __name__ == "__main__":
    main()
