"""How fast is recpress on a GPU? Remapping, training steps, memory, factorization, the stream, and the kernels' time.

    bash benchmarks/gpu.sh                          # everything; at most 7 minutes on one GPU
    bash benchmarks/gpu.sh --device cpu --tiny      # the same at toy sizes, to check that it runs

Limits of the device (bandwidth of a copy, flop/s of matrix products) are measured first; other results are also given
as a share of them. The most important questions come first. Each result is written when it is known, to a JSON file per
question, and the summary at the end has at most 12,000 characters. If a question fails, the others are still answered.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from recpress.benchmarks.common import machine, settings_of, write
from recpress.benchmarks.on_gpu import factorization, feeding, remapping, training
from recpress.benchmarks.on_gpu.device import Ceilings, ceilings
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group

NEEDS = "a GPU; writes one file a question: bash benchmarks/gpu.sh"
LONGEST = 12_000
"""Characters of the summary: what a machine that is lent for minutes shows of the output."""
QUESTIONS = {
    "ceilings": "What can the device do at most?",
    "remap": "How many ids a second does a map replace?",
    "train": "How fast is a training step, and how large, with each kind of tables?",
    "repeat": "Does the same seed give the same bits, with and without the pipeline?",
    "factorization": "How much of the device does a sweep of als use?",
    "stream": "Does the device wait for the stream?",
    "profile": "Which kernels take the time?",
}
Row = dict[str, Any]


class OutOfTime(Exception):
    """The minutes are over."""


def _out_of_time(number: int, frame: object) -> None:
    raise OutOfTime


def answers(device: torch.device, best: Ceilings, tiny: bool) -> dict[str, Callable[[], Iterable[Row]]]:
    """Question -> the rows of its table, one after the other."""
    return {
        "remap": lambda: remapping.rows(device, best, tiny),
        "train": lambda: training.rows(device, tiny),
        "repeat": lambda: training.repeated(device, tiny),
        "factorization": lambda: factorization.rows(device, best, tiny),
        "stream": lambda: feeding.rows(device, tiny),
        "profile": lambda: chain(training.profiled(device, tiny), factorization.profiled(device, tiny)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS)[1:], default=list(QUESTIONS)[1:])
    parser.add_argument("--minutes", type=float, default=7.0, help="stop measuring after this time")
    parser.add_argument("--out", type=Path, help="folder for one JSON file a question, and summary.txt")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    began, settings = time.perf_counter(), settings_of(vars(args))
    folder = args.out.parent if args.out and args.out.suffix else args.out  # `recpress bench` names a file
    known: dict[str, list[Row]] = {}
    notes: list[str] = []
    with process_group(args.device) as ranks:
        device = ranks.device

        def put(name: str, row: Row) -> None:
            known.setdefault(name, []).append(row)
            print(f"[{time.perf_counter() - began:.0f} s] {name}: {line(row)}", flush=True)
            if folder is not None:
                write(QUESTIONS[name], known[name], out=folder / f"gpu_{name}.json", settings=settings, device=device)

        best = ceilings(device, args.tiny)
        put("ceilings", best.row())
        possible = answers(device, best, args.tiny)
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, 60 * args.minutes - (time.perf_counter() - began)))
        for number, name in enumerate(args.questions):
            try:
                for row in possible[name]():
                    put(name, row)
            except OutOfTime:
                notes.append(f"out of time after {args.minutes:g} minutes, in: {', '.join(args.questions[number:])}")
                break
            except Exception as error:
                traceback.print_exc()
                notes.append(f"failed: {name} ({type(error).__name__}: {' '.join(str(error).split())[:300]})")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        signal.setitimer(signal.ITIMER_REAL, 0)
    text = summary(known, notes, machine(device)["device"])
    print(f"\n{text}", flush=True)
    if folder is not None:
        (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return int(any(note.startswith("failed") for note in notes))


def summary(known: Mapping[str, list[Row]], notes: list[str], device: str) -> str:
    """All results, one per line, in at most `LONGEST` characters."""
    head = [f"recpress on {device}", *notes]
    body = [f"{name}: {line(row)}" for name, rows in known.items() for row in rows]
    text = "\n".join([*head, *body])
    if len(text) <= LONGEST:
        return text
    cut = "\n(further results are in the JSON files)"
    return text[: LONGEST - len(cut)].rpartition("\n")[0] + cut


def line(row: Row) -> str:
    """A result in one line."""
    return ", ".join(f"{key} {_number(value)}" for key, value in row.items() if value is not None)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as problem:  # no GPU, and why
        print(f"gpu: error: {problem}", file=sys.stderr)
        sys.exit(2)
