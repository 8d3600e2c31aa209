"""How fast is recpress on a GPU? Factorization, remapping, training steps, the stream, and where their time goes.

    bash benchmarks/gpu.sh                          # everything; less than 8 minutes on one GPU
    bash benchmarks/gpu.sh --device cpu --tiny      # the same at toy sizes, to check that it runs

Limits of the device (bandwidth of a copy, flop/s of matrix products) are measured first; other results are also given
as a share of them. If a question fails, the others are still answered, and the failure is named at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recpress.benchmarks.common import publish, settings_of
from recpress.benchmarks.on_gpu import factorization, feeding, remapping, training
from recpress.benchmarks.on_gpu.device import Ceilings, ceilings
from recpress.trainer.distributed.process_group import process_group

NEEDS = "a GPU; writes one file a question: bash benchmarks/gpu.sh"
QUESTIONS = {
    "factorization": "How much of the device does a sweep of als use?",
    "remap": "How many ids a second does a map replace?",
    "train": "How fast is a training step, and how large, with each kind of tables?",
    "stream": "Does the device wait for the stream?",
    "profile": "Which kernels take the time?",
}


def answer(question: str, device: torch.device, best: Ceilings, tiny: bool) -> list[dict[str, Any]]:
    """The rows of one question's table."""
    how: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "factorization": lambda: factorization.rows(device, best, tiny),
        "remap": lambda: remapping.rows(device, best, tiny),
        "train": lambda: training.rows(device, tiny),
        "stream": lambda: feeding.rows(device, tiny),
        "profile": lambda: training.profiled(device, tiny) + factorization.profiled(device, tiny),
    }
    return how[question]()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, help="folder for one JSON file a question")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings, failed = settings_of(vars(args)), []
    with process_group(args.device) as ranks:
        device, began = ranks.device, time.perf_counter()

        def put(name: str, question: str, rows: list[dict[str, Any]]) -> None:
            folder = args.out.parent if args.out and args.out.suffix else args.out  # `recpress bench` names a file
            out = None if folder is None else folder / f"gpu_{name}.json"
            publish(question, rows, out=out, settings=settings, device=device)

        best = ceilings(device, args.tiny)
        put("ceilings", "What can the device do at most?", [best.row()])
        for name in args.questions:
            try:
                put(name, QUESTIONS[name], answer(name, device, best, args.tiny))
            except Exception:
                traceback.print_exc()
                failed.append(name)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"[{time.perf_counter() - began:.0f} s]", flush=True)
    if failed:
        print(f"gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
