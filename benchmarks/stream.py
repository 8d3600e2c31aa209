"""How much slower is the stream than bare decoding of the same columns? Rows a second of both, in turn.

    python benchmarks/stream.py --rows 10000000 --rounds 5 --out benchmarks/results/stream.json

The bare side decodes whole row groups by pyarrow in as many Python threads as the stream has, Arrow's own
threads off, and does nothing with them. The stream side makes shuffled batches of torch tensors from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.log import Log, open_log
from recpress.data.stream import InteractionStream


def write_narrow(path: Path, rows: int, group: int) -> None:
    """User, item, label and time, as made logs have them."""
    rng = np.random.default_rng(0)
    writer = None
    for first in range(0, rows, group):
        count = min(group, rows - first)
        table = pa.table(
            {
                "user_id": rng.integers(0, 1_000_000, count),
                "item_id": (rng.pareto(1.2, count) * 100).astype(np.int64) % 100_000,
                "label": rng.integers(1, 6, count).astype(np.float32),
                "time": rng.integers(0, 10**8, count),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=group)
    assert writer is not None
    writer.close()


def decode(log: Log, columns: list[str], threads: int) -> float:
    """Seconds to decode every row group of the log and nothing else."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda group: log.train.read_table(group, columns).num_rows, log.train.groups):
            pass
    return time.perf_counter() - began


def stream(log: Log, config: StreamConfig, sample: SampleConfig | None, epoch: int) -> tuple[float, int]:
    """Seconds of one epoch, and its rows."""
    began = time.perf_counter()
    rows = sum(batch.size for batch in InteractionStream(log.train, log.schema, config, sample=sample, epoch=epoch))
    return time.perf_counter() - began, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", help="a log to read; by default a narrow one is made")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--group", type=int, default=1_000_000, help="rows of a row group of the made log")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.log is None:
            write_narrow(Path(folder) / "train.parquet", args.rows, args.group)
        log = open_log(args.log or folder, Schema(label="label") if args.log is None else None)
        cases = [
            (threads, shuffle, rate)
            for threads in args.threads
            for shuffle, rate in ((True, 1.0), (False, 1.0), (True, 0.1))
        ]
        columns = InteractionStream(log.train, log.schema, StreamConfig()).columns
        results = []
        for threads, shuffle, rate in cases:
            config = StreamConfig(batch_size=args.batch, threads=threads, shuffle=shuffle)
            bare, ours = [], []
            for number in range(args.rounds):
                bare.append(decode(log, columns, threads))
                seconds, rows = stream(log, config, SampleConfig(rate=rate), number)
                ours.append(seconds)
            ratio = statistics.median(one / other for one, other in zip(bare, ours, strict=True))
            results.append(
                {
                    "threads": threads,
                    "shuffle": shuffle,
                    "rate": rate,
                    "rows_read": log.train.num_rows,
                    "rows_given": rows,
                    "bare_rows_per_s": log.train.num_rows / statistics.median(bare),
                    "stream_rows_per_s": log.train.num_rows / statistics.median(ours),
                    "ratio": ratio,
                }
            )
            speeds = [results[-1][side] / 1e6 for side in ("bare_rows_per_s", "stream_rows_per_s")]
            print(
                f"threads {threads} shuffle {shuffle!s:5} rate {rate}: M rows/s bare {speeds[0]:.1f}, "
                f"stream {speeds[1]:.1f}, ratio {ratio:.2f}",
                flush=True,
            )
    if args.out:
        about = {"cpus": os.cpu_count(), "torch": torch.__version__, "pyarrow": pa.__version__, **vars(args)}
        about["out"] = str(args.out)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
