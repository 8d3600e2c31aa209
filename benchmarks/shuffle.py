"""How well does the stream shuffle, and does the rest matter to training?

Takes 10 s small, 1 minute full (estimated), alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/shuffle.py --out runs/shuffle.json

First question: one epoch of a log whose column is the row's position. `moved` is the mean distance between a row's
position in the stream and in the log, in units of the log; a perfect shuffle moves rows by 1/3, with quantiles 0.051,
0.293 and 0.684. `clumps` is the variance of the batches' mean positions, in units of that of a perfect shuffle: 1 for a
uniform draw from the log, the batch size for contiguous batches. The buffer is that of other readers (`datasets`,
torchdata): the next row replaces a random one of the buffer.

Second question (`--train`): a synthetic log, sorted by user or by a time in which items appear and disappear, one epoch
of the two-tower on random tables, and NDCG@10 of the held-out rows. The log is `--buffers` times the buffer of the
stream, whose row groups are a quarter of it as by default.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.data.config import SampleConfig, Schema, StreamConfig, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.interactions import synth
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.config import TrainConfig
from recpress.trainer.train.stage import train

SMALL = ("--rows", "4194304")
ORDERS = ("user", "time")


def written(folder: Path, rows: int, group: int) -> Path:
    """A log whose users are the places of its rows."""
    folder.mkdir(parents=True)
    table = pa.table({"user_id": np.arange(rows)})
    pq.write_table(table, folder / "train.parquet", row_group_size=group, compression="zstd")
    return folder


def streamed(folder: Path, config: StreamConfig) -> np.ndarray:
    """Places in the log, in the order of the stream."""
    log = open_log(folder, Schema(item=""), pairs=False)
    users = (batch.user for batch in InteractionStream(log.train, log.schema, config))
    return np.concatenate([user.numpy() for user in users if user is not None])


def buffered(rows: int, buffer: int, rng: np.random.Generator) -> np.ndarray:
    """The order that a shuffle buffer gives to 0 … rows - 1."""
    slots = rng.integers(0, buffer, rows - buffer)  # each new row goes here, and what was here goes out
    steps = np.arange(len(slots))
    order = np.lexsort((steps, slots))
    before = np.full(len(slots), -1)  # the step that last put a row into the same slot
    same = slots[order][1:] == slots[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    out = np.where(before < 0, slots, before + buffer)
    last = np.full(buffer, -1)
    np.maximum.at(last, slots, steps)
    left = np.where(last < 0, np.arange(buffer), last + buffer)
    return np.concatenate([out, rng.permutation(left)])


def quality(places: np.ndarray, batch: int) -> dict[str, float]:
    """`places[k]` is where the k-th row of the stream is in the log."""
    rows = len(places)
    moved = np.abs(places - np.arange(rows)) / rows
    means = places[: rows // batch * batch].reshape(-1, batch).mean(1) / rows
    low, middle, high = np.quantile(moved, [0.1, 0.5, 0.9])
    # without replacement, the mean of a batch has the variance (N - B) / (N - 1) / B of a single row
    fair = (rows - batch) / (rows - 1) / batch / 12
    clumps = float(means.var() / fair)
    return {"moved": float(moved.mean()), "10 %": low, "50 %": middle, "90 %": high, "clumps": clumps}


def qualities(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    log = written(folder / "places", args.rows, args.group)
    default = StreamConfig(batch_size=args.batch)
    ways = {
        "perfect": lambda: rng.permutation(args.rows),
        "recpress, default": lambda: streamed(log, default),
        "recpress, a quarter of the buffer": lambda: streamed(log, replace(default, buffer_rows=1 << 18)),
        "recpress, 32 lanes": lambda: streamed(log, replace(default, interleave=32)),
        "recpress, 1 lane": lambda: streamed(log, replace(default, interleave=1)),
        f"a buffer of {default.buffer_rows:,}": lambda: buffered(args.rows, default.buffer_rows, rng),
        "not shuffled": lambda: np.arange(args.rows),
    }
    table = []
    for name, way in ways.items():
        places = way()
        assert np.array_equal(np.sort(places), np.arange(args.rows)), name
        table.append({"order": name, **quality(places, args.batch)})
    return table


def sorted_log(source: Path, folder: Path, order: str, group: int) -> Path:
    """The log with its train rows in another order: `user`, `time` or `random`."""
    train_rows = pq.read_table(source / "train", columns=["user_id", "item_id"])
    items, rng = train_rows.column("item_id").to_numpy(), np.random.default_rng(0)
    if order == "random":
        places = rng.permutation(len(items))
    elif order == "user":
        places = np.argsort(train_rows.column("user_id").to_numpy(), kind="stable")
    else:  # each item is met in a fifth of the time, from its own beginning on
        birth = rng.random(int(items.max()) + 1)
        places = np.argsort(birth[items] + 0.2 * rng.random(len(items)), kind="stable")
    folder.mkdir(parents=True)
    pq.write_table(train_rows.take(places), folder / "train.parquet", row_group_size=group)
    for part in ("test", "test_negatives"):
        (folder / part).symlink_to(source / part)
    return folder


def trainings(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    source = folder / "synth"
    with contextlib.redirect_stderr(io.StringIO()):
        synth(SynthConfig(users=args.users, items=args.items, rows=args.train_rows, negatives=99), source)
    buffer, network = args.train_rows // args.buffers, CompareCadcConfig().random
    stream = replace(network.stream, batch_size=args.train_batch, buffer_rows=buffer)
    logs = {order: sorted_log(source, folder / order, order, buffer // 4) for order in (*ORDERS, "random")}
    ways = [("random", "not shuffled", False)]
    ways += [(order, how, how == "shuffled") for order in ORDERS for how in ("shuffled", "not shuffled")]
    table = []
    for order, how, shuffle in ways:
        results = []
        for seed in range(args.seeds):
            shared = {name: getattr(network, name) for name in ("model", "optimizer", "negatives")}
            config = TrainConfig(
                data=str(logs[order]),
                out=str(folder / f"model-{order}-{how}-{seed}"),
                stream=replace(stream, shuffle=shuffle, seed=seed),
                sample=SampleConfig(rate=1.0),
                epochs=1,
                seed=seed,
                tensorboard=False,
                **shared,
            )
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                results.append(train(config).metrics)
        row: dict[str, Any] = {"the file's order": order, "stream": how}
        for metric in ("NDCG@10", "HR@10"):
            values = [found[metric] for found in results]
            row[metric] = statistics.mean(values)
            row[f"{metric} ±"] = statistics.stdev(values) if args.seeds > 1 else None
        table.append(row)
    return table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train", action="store_true", help="the second question instead of the first")
    parser.add_argument("--rows", type=int, default=50 << 20, help="50 times the default buffer")
    parser.add_argument("--group", type=int, default=1 << 18)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--train-rows", type=int, default=200_000)
    parser.add_argument("--train-batch", type=int, default=256)
    parser.add_argument("--buffers", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    question = "What does one epoch make of a sorted log?" if args.train else "How far does the stream move rows?"
    with tempfile.TemporaryDirectory() as folder:
        table = (trainings if args.train else qualities)(Path(folder), args)
    publish(question, table, out=args.out, settings=settings_of(vars(args)))


if __name__ == "__main__":
    main()
