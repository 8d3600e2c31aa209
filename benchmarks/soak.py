"""Does the stream's memory stay within its bound, however long it runs?

Takes 10 s small, 10 minutes full, alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --minutes 60 --rows-per-second 400000 --out runs/soak.json
    OMP_NUM_THREADS=1 python benchmarks/soak.py --cases --minutes 0.5 --rows-per-second 1500000 --every 0.004

Epoch after epoch of a synthetic log, as fast as possible, or with `--rows-per-second` no faster than a trainer would
take them. Every second (`--every`) the anonymous memory of the process is read, above that before the stream began. The
slope is that of a straight line through the samples after the first fifth of the time. `bound` is that of the
configuration, `InteractionStream.memory_bound()`. `--cases` runs the configurations of docs/how/stream.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from recpress.benchmarks import readers, synthetic_logs
from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.measure import alone
from recpress.benchmarks.processes import status_bytes
from recpress.data.config import SampleConfig, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.keyed import KeyedBatch, KeyedBatches
from recpress.data.stream.loader import InteractionStream

SMALL = ("--minutes", "0.1", "--every", "0.2", "--rows", "1000000")
FULL = ("--minutes", "10")

CASES: list[dict[str, object]] = [
    {"shape": "narrow", "threads": 1},
    {"shape": "narrow", "threads": 2},
    {"shape": "narrow", "threads": 4},
    {"shape": "narrow", "threads": 2, "buffer_rows": 1 << 19},
    {"shape": "narrow", "threads": 2, "buffer_rows": 1 << 18, "rate": 0.1},
    {"shape": "wide", "threads": 1, "buffer_rows": 1 << 17, "rows": 1_000_000},
    {"shape": "wide", "threads": 1, "buffer_rows": 1 << 17, "rows": 2_000_000},
    {"shape": "wide", "threads": 1, "buffer_rows": 1 << 17, "rows": 4_000_000},
    {"shape": "lists", "threads": 1, "rows": 4_000_000},
]
SHAPES = {"narrow": synthetic_logs.narrow, "wide": synthetic_logs.wide, "lists": synthetic_logs.with_lists}


def soak(folder: Path, made: synthetic_logs.SyntheticLog, args: argparse.Namespace) -> dict[str, object]:
    """Runs the stream for the minutes; a row of the table."""
    readers.warmed()
    config = StreamConfig(batch_size=args.batch, num_threads=args.threads, buffer_rows=args.buffer_rows)
    log = open_log(folder, made.schema, pairs=False)
    sample = SampleConfig(rate=args.rate)
    before, began = status_bytes("RssAnon"), time.monotonic()
    end, due, rows, epoch = began + 60 * args.minutes, began, 0, 0
    samples: list[tuple[float, int]] = []
    held: deque[KeyedBatch] = deque(maxlen=3)  # as a training pipeline holds them
    while time.monotonic() < end:
        stream = InteractionStream(log.train, log.schema, config, sample=sample, epoch=epoch)
        bound = stream.memory_bound()
        for batch in KeyedBatches(stream, made.keys):
            held.append(batch)
            rows += batch.sparse_features.stride()
            if (now := time.monotonic()) >= due:
                samples.append((now - began, status_bytes("RssAnon") - before))
                due = now + args.every
            if args.rows_per_second and (wait := began + rows / args.rows_per_second - now) > 0:
                time.sleep(min(wait, 1.0))
            if now >= end:
                break
        epoch += 1
    at, used = np.array(samples, dtype=np.float64).T
    late = at >= at[-1] / 5
    slope = np.polyfit(at[late], used[late], 1)[0] if late.sum() > 1 else float("nan")
    return {
        "log": args.shape,
        "buffer rows": args.buffer_rows,
        "threads": args.threads,
        "sample": args.rate,
        "minutes": args.minutes,
        "epochs": epoch,
        "M rows": rows / 1e6,
        "M rows/s": rows / at[-1] / 1e6,
        "most MB": used.max() / 1e6,
        "at the end MB": used[-1] / 1e6,
        "bound MB": bound / 1e6,
        "most / bound": used.max() / bound,
        "MB/hour": slope * 3600 / 1e6,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two samples of the memory")
    parser.add_argument("--rows-per-second", type=float, help="no faster than this")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--shape", choices=SHAPES, default="narrow")
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the log, and of an epoch")
    parser.add_argument("--rate", type=float, default=1.0, help="of the sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--buffer-rows", type=int, default=StreamConfig().buffer_rows)
    parser.add_argument(
        "--cases",
        action="store_true",
        help="the configurations of docs/how/stream.md, one after the other, whatever the five above say",
    )
    args = parser.parse_args()
    table = []
    for case in CASES if args.cases else [{}]:
        of_case = argparse.Namespace(**vars(args) | case)
        with tempfile.TemporaryDirectory() as folder:
            made = alone(SHAPES[of_case.shape], Path(folder), of_case.rows)
            table.append(alone(soak, Path(folder), made, of_case))
    publish(
        "Does the stream's memory stay within its bound, and flat?",
        table,
        out=args.out,
        settings=settings_of(vars(args)),
        plots=[
            bars(["most MB", "bound MB"], ["log", "buffer rows", "threads", "sample"], title="The peak and its bound")
        ],
    )


if __name__ == "__main__":
    main()
