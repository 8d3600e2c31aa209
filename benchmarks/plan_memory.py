"""How close is the memory of `recpress plan` to that of real runs on CPU ranks?

Takes 20 s small, 6 minutes full (estimated), alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py --out plan_memory.json

For each size and kind of tables, `recpress train` runs on 1 and on 2 ranks of this machine, while this process reads
`RssAnon` of each from /proc every 5 ms: anonymous memory, which the kernel cannot reclaim. Factors, maps and libraries
that are mapped from files are page cache, counted neither here nor by the plan. Log, factors and maps are synthetic:
memory does not depend on their values. The peak of the heaviest rank is compared with the plan's. Each case runs twice:
ending before the first checkpoint, and with one every few steps, whose copy of the state stays in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.processes import free_port
from recpress.data.config import SynthConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.synthetic.interactions import synth
from recpress.modules.als.factors import shard_name
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import FACTORS, describe_log
from recpress.trainer.artifacts.id_maps import HASH, ROW_VECTORS, save_maps
from recpress.trainer.plan.config import PlanConfig
from recpress.trainer.plan.stage import plan

SMALL = ("--mb", "50", "--ranks", "1", "--kinds", "random", "frozen fp32", "--checkpoint-steps", "5")
FULL = ("--mb", "100", "400", "--kinds", "random", "frozen fp32", "hashed fp32")

DIM, SHARE = 128, 0.25
STEPS = 24
"""Of a run at least."""
KINDS = {
    "random": ["--model.tables.strategy", "random", "--model.tables.dim", str(DIM)],
    "trained factors": ["--model.tables.strategy", "warm-start"],
    "frozen fp32": [],
    "frozen int8": ["--model.tables.storage", "int8"],
    "hashed fp32": [],
    "hashed int8": ["--model.tables.storage", "int8"],
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mb", type=int, nargs="*", default=[100, 400, 1200], help="fp32 tables of a rank, MB")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--batches", type=int, nargs="*", default=[2048], help="rows of a rank's batch")
    parser.add_argument("--checkpoint-steps", type=int, nargs="*", default=[0, 5], help="steps between; 0: none")
    args = parser.parse_args()
    found = []
    for megabytes in args.mb:
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                rows = make(Path(folder), megabytes * 1_000_000 * ranks, STEPS * ranks * max(args.batches))
                for kind, batch, every in product(args.kinds, args.batches, args.checkpoint_steps):
                    rate = min(1.0, max(0.1, STEPS * ranks * batch / rows))
                    found.append(compare(Path(folder), kind, megabytes, ranks, every, batch, rate))
                    print(json.dumps(found[-1]), flush=True)
    worst = max(abs(row["error %"]) for row in found)
    question = f"recpress plan against the measured peak of a rank: at most {worst:.1f} % off"
    publish(
        question,
        found,
        out=args.out,
        settings=settings_of(vars(args)),
        plots=[
            bars(
                ["plan MiB", "measured MiB"],
                ["MB a rank", "ranks", "tables", "batch", "checkpoints"],
                title="Peak of a rank",
            )
        ],
    )


def make(folder: Path, table_bytes: int, fewest: int) -> int:
    """A log, random factors and random maps with their row vectors; tables of so many bytes in all.

    Returns:
        Rows of the log, `fewest` at least.
    """
    ids = table_bytes // (4 * DIM)
    sizes = {"user": round(0.9 * ids), "item": ids - round(0.9 * ids)}
    rows = max(500_000, 2 * ids, fewest)
    synth(SynthConfig(users=sizes["user"], items=sizes["item"], rows=rows, held_out_users=0), folder / "log")
    log = open_log(folder / "log")
    rng = np.random.default_rng(0)
    with artifact.writing(folder / "factors", FACTORS, {"log": describe_log(log), "dim": DIM, "crossfit": None}) as tmp:
        for side, number in sizes.items():
            matrix(tmp / shard_name(side, 0, 1), number, rng)
            np.save(tmp / shard_name(f"{side}_count", 0, 1), np.ones((number, 1), np.float32))
    maps = {
        side: IdMap(
            rows=torch.from_numpy(rng.integers(0, round(SHARE * number), (number, 1), dtype=np.int32)),
            num_rows=round(SHARE * number),
            vocabulary=log.vocabulary_fingerprint(side),  # type: ignore[arg-type]
        )
        for side, number in sizes.items()
    }
    with artifact.writing(folder / "maps", HASH, {"log": describe_log(log)}) as tmp:
        save_maps(maps, tmp)
        for side, id_map in maps.items():
            matrix(tmp / side / ROW_VECTORS, id_map.num_rows, rng)
    return rows


def matrix(path: Path, rows: int, rng: np.random.Generator) -> None:
    """Random float32 (rows, DIM), written block by block."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (rows, DIM))
    for first in range(0, rows, 1 << 16):
        last = min(first + (1 << 16), rows)
        file[first:last] = rng.standard_normal((last - first, DIM), dtype=np.float32)
    file.flush()


def compare(folder: Path, kind: str, megabytes: int, ranks: int, every: int, batch: int, rate: float) -> dict[str, Any]:
    """every: steps between checkpoints; 0: it ends before one is due. batch: of a rank. rate: of the sample."""
    options = ["--data", str(folder / "log"), "--sample.rate", str(rate), "--epochs", "1", *KINDS[kind]]
    options += [] if kind == "random" else ["--factors", str(folder / "factors")]
    options += ["--hash", str(folder / "maps")] if kind.startswith("hashed") else []
    steps = ["--stream.batch-size", str(batch), "--overwrite", "--no-tensorboard", "--out", str(folder / "model")]
    steps += ["--checkpoint.minutes", "0", "--checkpoint.steps", str(every)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cluster = ["--cluster.device", "cpu", "--cluster.ranks-per-node", str(ranks)]
    cluster += ["--cluster.host-memory-gib", str(memory)]
    with contextlib.redirect_stdout(io.StringIO()):
        said = plan(tyro.cli(PlanConfig, args=[*options, *steps, *cluster, "--no-compare"]))
    moments = {moment: size for moment, size in said["peaks"]["host"].items() if every or moment != "checkpoint"}
    predicted = max(moments.values()) / 2**20
    measured, seconds = run([*options, *steps], ranks)
    most = max(measured)
    return {
        "MB a rank": megabytes,
        "ranks": ranks,
        "tables": kind,
        "batch": batch,
        "checkpoints": f"every {every} steps" if every else "none",
        "plan MiB": round(predicted, 1),
        "measured MiB": round(most, 1),
        "other ranks MiB": ", ".join(str(round(m)) for m in sorted(measured)[:-1]),
        "error %": round(100 * (predicted - most) / most, 1),
        "seconds": round(seconds),
    }


def run(options: list[str], ranks: int) -> tuple[list[float], float]:
    """Peak RssAnon of each rank in MiB, and the time of the run."""
    port = free_port()
    began, processes = time.monotonic(), []
    for rank in range(ranks):
        place: dict[str, int | str] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | ({name: str(value) for name, value in place.items()} if ranks > 1 else {})
        command = [sys.executable, "-m", "recpress.trainer.cli", "train", *options]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    peaks = [0.0] * ranks
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if size := re.search(r"RssAnon:\s+(\d+)", status):
                    peaks[rank] = max(peaks[rank], int(size.group(1)) / 1024)
        time.sleep(0.005)
    for process in processes:
        if process.returncode:
            assert process.stderr is not None
            raise RuntimeError(process.stderr.read()[-2000:])
    return peaks, time.monotonic() - began


if __name__ == "__main__":
    main()
