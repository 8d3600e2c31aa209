"""What does each kind of sample read, and how well does it estimate the log, in the order of time or shuffled?

Takes 5 s small, 1 minute full (estimated), alone on two cores.

    python benchmarks/sampling.py --rows 3000000 --out runs/sampling.json

For each kind of sample: bytes read as a share of the log's (counted by the operating system), CPU seconds to read it,
and the variance of its estimates over `--seeds` seeds, relative to that of `rows`: of the mean time, and of the shares
of the most popular item and of the most active user. Also: the variance of the mean time predicted by the design effect
of the log (`recpress.data.sampling.design_effect`).
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import numpy as np

from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.measure import bytes_read
from recpress.data.config import LayoutConfig, SampleConfig, SynthConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.sampling.design_effect import design_effects
from recpress.data.sampling.sample import write_sample
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import Selection
from recpress.data.synthetic.interactions import synth

SMALL = ("--rows", "200000", "--group", "2000", "--seeds", "20")

KINDS: tuple[Any, ...] = ("rows", "block", "user")


def reading(log: Log, columns: list[str], sample: SampleConfig) -> dict[str, float]:
    """CPU seconds and bytes to read a sample, and what opening it took before."""
    began = time.process_time()
    Selection(log.train, sample).num_rows  # noqa: B018  # of `user`, reads the column of users
    opened, before = time.process_time(), bytes_read()
    rows = sum(len(data[columns[0]]) for data in iter_columns(log.train, columns, sample=sample))
    return {
        "rows": rows,
        "bytes": bytes_read() - before,
        "open CPU s": opened - began,
        "read CPU s": time.process_time() - opened,
    }


def estimates(log: Log, data: dict[str, np.ndarray], kind: Any, rate: float, seeds: int) -> np.ndarray:
    """(seeds, 3): mean time, share of the most popular item, share of the most active user."""
    user, item = (np.bincount(data[name]).argmax() for name in ("user_id", "item_id"))
    starts = np.cumsum([0, *(group.num_rows for group in log.train.groups)])
    found = []
    for seed in range(seeds):
        selection = Selection(log.train, SampleConfig(kind=kind, rate=rate, seed=seed))
        parts = []
        for group in selection.candidates:
            rows = selection.of(group)
            parts.append(np.arange(starts[group], starts[group + 1]) if rows is None else starts[group] + rows)
        rows = np.concatenate(parts)
        shares = [(data["item_id"][rows] == item).mean(), (data["user_id"][rows] == user).mean()]
        found.append([data["time"][rows].mean(), *shares])
    return np.array(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--group", type=int, default=20_000, help="rows of a row group")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECPRESS_CACHE"] = f"{folder}/cache"  # what an earlier run found would make opening look cheap
        layout = LayoutConfig(row_group_rows=args.group)
        made = SynthConfig(users=args.rows // 100, rows=args.rows, held_out_users=0, layout=layout)
        synth(made, f"{folder}/by time")
        log = open_log(f"{folder}/by time")
        write_sample(log, f"{folder}/shuffled", SampleConfig(), shuffle=True, layout=layout)
        for order in ("by time", "shuffled"):
            log = open_log(f"{folder}/{order}")
            columns = [log.schema.user, log.schema.item, log.schema.time or ""]
            parts = list(iter_columns(log.train, columns))
            data = {name: np.concatenate([part[name] for part in parts]) for name in columns}
            del parts
            whole = reading(log, columns, SampleConfig())
            effect = design_effects(log.train, ["time"])["time"].effect
            base = None
            for kind in KINDS:
                read = reading(log, columns, SampleConfig(kind=kind, rate=args.rate))
                variance = estimates(log, data, kind, args.rate, args.seeds).var(axis=0)
                base = variance if base is None else base
                ratios = variance / base
                rows.append(
                    {
                        "log": order,
                        "kind": kind,
                        "rows %": 100 * read["rows"] / args.rows,
                        "bytes %": 100 * read["bytes"] / whole["bytes"],
                        "open CPU s": read["open CPU s"],
                        "read CPU s": read["read CPU s"],
                        "variance: time": ratios[0],
                        "by design effect": effect if kind == "block" else None,
                        "top item": ratios[1],
                        "top user": ratios[2],
                    }
                )
    question = "What does each kind of sample read, and how far are its estimates spread (variance over that of rows)?"
    publish(
        question,
        rows,
        out=args.out,
        settings=settings_of(vars(args)),
        plots=[
            bars(["bytes %", "read CPU s"], ["log", "kind"], title="What a sample of each kind reads"),
            bars(["top item", "top user"], ["log", "kind"], title="Variance of two shares over that of `rows`"),
        ],
    )


if __name__ == "__main__":
    main()
