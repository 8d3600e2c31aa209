"""How long does it take to resume in the middle of a long log? Seconds until the first batch.

Takes 10 s small, half a minute full (estimated), alone on two cores.

    OMP_NUM_THREADS=1 python benchmarks/resume.py --rows 100000000 --out runs/resume.json

The log is one file of 4 M rows under many names, by hard links: each has its own footer and row groups, only the bytes
on the disk are shared. Steps are random, the same for all readers; each is resumed in a new process after its imports.
Ours starts from two integers, epoch and step, `open_log` included. torchdata's StatefulDataLoader gets the state that
it would have saved there and replays, as the plain `iter_batches` loop has no state. Its first batch is compared with
the rows of the file.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from recpress.benchmarks import readers, synthetic_logs
from recpress.benchmarks.common import MISSING, arguments, bars, publish, settings_of
from recpress.benchmarks.measure import Cost, alone, cost
from recpress.benchmarks.reader import imported
from recpress.benchmarks.synthetic_logs import SyntheticLog
from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.loader import InteractionStream

SMALL = ("--rows", "8000000", "--file-rows", "500000", "--steps", "2")
Resume = Callable[[int], float]
"""Goes on at this step, and returns after the first batch."""


def ours(made: SyntheticLog, config: StreamConfig) -> Resume:
    def resume(step: int) -> float:
        log = open_log(made.folder, made.schema)
        batch = next(iter(InteractionStream(log.train, log.schema, config, start_step=step)))
        assert batch.step == step
        return batch.size

    return resume


def replay(made: SyntheticLog, size: int) -> Resume:
    def resume(step: int) -> float:
        from torchdata.stateful_dataloader import StatefulDataLoader

        def loader() -> StatefulDataLoader:
            return StatefulDataLoader(readers.ArrowBatches(made, size), batch_size=None, num_workers=0)

        first = loader()
        next(iter(first))
        state = first.state_dict()
        for key in ("_num_yielded", "_sampler_iter_yielded"):
            if state.get(key) is not None:
                assert state[key] == 1
                state[key] = step
        second = loader()
        second.load_state_dict(state)
        columns = next(iter(second))
        user = columns["user_id"]
        np.testing.assert_array_equal(user.numpy(), _rows_at(made, size, step))
        return len(user)

    return resume


def _rows_at(made: SyntheticLog, size: int, step: int) -> np.ndarray:
    """Users of the batch that `ArrowBatches` gives at a step; all files are the same one."""
    with pq.ParquetFile(made.files[0]) as parquet:
        column = parquet.read(["user_id"], use_threads=False).column(0).to_numpy()
    first = step % -(-len(column) // size) * size
    return column[first : first + size]


def run(resume: Resume, step: int) -> Cost:
    readers.warmed()
    return cost(lambda: resume(step))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--file-rows", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=7, help="how many, drawn at random")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    imported()
    with tempfile.TemporaryDirectory() as folder:
        made = alone(synthetic_logs.long, Path(folder) / "log", args.rows, args.file_rows)
        steps = np.random.default_rng(0).integers(0, args.rows // args.batch, args.steps).tolist()
        shuffled, plain = (
            StreamConfig(batch_size=args.batch, num_threads=args.threads, shuffle=shuffle) for shuffle in (True, False)
        )
        sides = {
            "recpress, shuffled": ours(made, shuffled),
            "recpress, in order": ours(made, plain),
            "torchdata StatefulDataLoader": replay(made, args.batch),
        }
        table = []
        for name, resume in sides.items():
            if name.startswith("torchdata") and readers.Peer(name, lambda: 0.0, package="torchdata").missing:
                table.append({"reader": name, "note": MISSING})
                continue
            costs = [alone(run, resume, step) for step in steps]
            table.append(
                {
                    "reader": name,
                    "log, M rows": args.rows / 1e6,
                    "seconds, median": statistics.median(c.wall for c in costs),
                    "seconds, longest": max(c.wall for c in costs),
                    "CPU s, median": statistics.median(c.cpu for c in costs),
                    "peak MB": max(c.peak for c in costs) / 1e6,
                }
            )
    publish(
        "How long until the first batch, in the middle of a long log?",
        table,
        out=args.out,
        settings=settings_of(vars(args)) | {"drawn steps": steps},
        plots=[bars(["seconds, median", "CPU s, median"], ["reader"], title="Until the first batch")],
    )


if __name__ == "__main__":
    main()
